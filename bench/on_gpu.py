"""All that waits for a GPU, with one command: first that the engine is right there, then how fast it is.

python bench/on_gpu.py                        # checks, then one model and batch after another, each into its own JSON
python bench/on_gpu.py --minutes 5            # begins no model after that; the same call goes on with what is missing

The checks run the tiny denoisers of tests/tiny on CUDA, in float32 and bfloat16, compiled and as one CUDA graph a step, against
float64 on the CPU: the engine may be off by twice what the plain path is. No speed is measured while one of them is red.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, scoped, spec_of
from agd_fast.engine import engine_of
from agd_fast.environment import environment
from agd_fast.files import read_json, write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu"
FAMILIES = ("sd15", "sdxl", "dit", "pixart", "sd3", "qwenimage", "wan", "sana", "auraflow")
KINDS = (None, "cross_attention")
SPEED = [(model, batch) for model in ("sdxl-1024", "dit-xl2-256") for batch in (1, 4, 16)]
SPEED += [(model, 1) for model in ("sd21-768", "sd3-medium-1024", "pixart-sigma-1024", "wan-1.3b", "qwen-image")]
OMEGAS = (2.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further model after that")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda", help="cpu: the checks alone, for a look at what they do")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    deadline = time.monotonic() + 60 * args.minutes
    checks = args.output / "engine_checks.json"
    if not checks.exists():
        rows = check(torch.device(args.device))
        write_json(checks, {"environment": environment(), "rows": rows})
    if red := [row for row in read_json(checks)["rows"] if not row["ok"]]:
        sys.exit(f"{len(red)} checks are red, first {red[0]}: see {checks}; delete it to check again")
    if args.device == "cuda":
        for model, batch in SPEED:
            measure(model, batch, args.output / f"{model}_{batch}.json", deadline)


def check(device: torch.device) -> list[dict[str, Any]]:
    """One row a family, kind and dtype: the worst error of a plain and of an optimized forward over a schedule of 4 steps."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny import FAMILIES as TINY

    rows = []
    for name in FAMILIES:
        for kind in KINDS:
            for dtype in (torch.float32, torch.bfloat16):
                row = {"family": name, "kind": kind, "dtype": str(dtype).removeprefix("torch.")}
                row |= compare(TINY[name], kind, device, dtype)
                print(row, flush=True)
                rows.append(row)
    return rows


@torch.no_grad()
def compare(family: Any, kind: str | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    pipe = family.pipeline()
    spec = spec_of(pipe)
    agd.attach(pipe, agd.AdapterConfig(kind, 4))
    component = next(iter(components_of(pipe, spec).values()))
    adapter = attachment_of(component).adapter  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=random))
    calls: list[tuple[Any, Any]] = []
    hook = component.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe(**family.inputs(1), **family.call, **family.guided)
    hook.remove()

    def run(device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        component.to(device, dtype)
        adapter.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        found = []
        for omega in OMEGAS:
            with scoped(component, pipe.scheduler.timesteps), agd.guided(component, omega):
                for args, kwargs in moved(calls, device, dtype):
                    output = component(*args, **kwargs)
                    found.append((output if isinstance(output, torch.Tensor) else output[0]).double().cpu())
        return found

    exact = run(torch.device("cpu"), torch.float64)
    plain = run(device, dtype)
    agd.optimize(component, spec=spec)
    run(device, dtype)  # where it captures, compiles and records
    found = run(device, dtype)
    engine = engine_of(component)
    assert engine is not None
    lost, off = (max(float((a - b).abs().max()) for a, b in zip(one, exact, strict=True)) for one in (plain, found))
    floor = torch.finfo(dtype).eps * max(float(one.abs().max()) for one in exact)
    info = engine.info()
    return {"plain": lost, "engine": off, "ok": off <= 2 * lost + floor and not info["plain_because"], **info}


def moved(calls: list[Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Calls on a device and in a dtype, timesteps in their own; what is the same tensor in all of them stays one."""
    found: dict[int, torch.Tensor] = {}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in found:
            found[id(leaf)] = leaf.to(device, dtype if leaf.is_floating_point() and leaf.ndim > 1 else leaf.dtype)
        return found[id(leaf)]

    return pytree.tree_map(one, calls)


def measure(model: str, batch: int, path: Path, deadline: float) -> None:
    """One run of nfe_speed.py into `path`, unless it is there or there is no time."""
    if path.exists() or time.monotonic() > deadline:
        return
    arguments = ["--model", model, "--batch", str(batch), "--dtype", "bf16", "--json", str(path)]
    done = subprocess.run([sys.executable, str(HERE / "nfe_speed.py"), *arguments], timeout=None)
    print(f"{model} at batch {batch}: {'done' if done.returncode == 0 else f'failed ({done.returncode})'}", flush=True)


if __name__ == "__main__":
    main()
