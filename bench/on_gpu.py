"""All that waits for a GPU, with one command: first that kernels and engine are right there, then how fast they are.

python bench/on_gpu.py                        # checks, then one kernel, model and batch after another, each into its own JSON
python bench/on_gpu.py --minutes 5            # begins no kernel or model after that; the same call goes on with what is missing

Every kernel is checked with every configuration, in bfloat16, float16 and float32, against float64: it may be off by twice what
PyTorch is in that dtype. compute-sanitizer looks at them where it is installed. The tiny denoisers of tests/tiny run on CUDA, in
float32 and bfloat16, compiled and as one CUDA graph a step, with the kernels that win and with all of them; they are held to the
same rule, against float64 on the CPU. No speed is measured while a check is red.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, scoped, spec_of
from agd_fast.engine import engine_of
from agd_fast.environment import environment
from agd_fast.files import read_json, write_json
from agd_fast.ops import OPS, Kernels, kernels_info
from nfe_speed import commit
from speed.hardware import gpu_state
from speed.kernel_checks import checks as kernel_checks
from speed.kernels import BATCHES, measure_case, measure_ceiling, odd_cases, real_cases

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu"
FAMILIES = ("sd15", "sdxl", "dit", "pixart", "sd3", "qwenimage", "wan", "sana", "auraflow")
KINDS = (None, "cross_attention")
POLICIES: tuple[Kernels | None, ...] = (None, "always")
SPEED = [(model, batch) for model in ("sdxl-1024", "dit-xl2-256") for batch in (1, 4, 16)]
SPEED += [(model, 1) for model in ("sd21-768", "sd3-medium-1024", "pixart-sigma-1024", "wan-1.3b", "qwen-image")]
OMEGAS = (2.0, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further kernel or model after that")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--device", default="cuda", help="cpu: the engine's checks alone, for a look at what they do")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    deadline = time.monotonic() + 60 * args.minutes
    if args.device == "cuda":
        once(args.output / "kernel_checks.json", check_kernels)
        once(args.output / "kernel_sanitizer.json", sanitize)
    else:
        list_kernels()
    once(args.output / "engine_checks.json", lambda: {"rows": check(torch.device(args.device))})
    if args.device == "cuda":
        measure_kernels(args.output, deadline)
        for model, batch in SPEED:
            measure(model, batch, args.output / f"{model}_{batch}.json", deadline)


def once(path: Path, checks: Callable[[], dict[str, Any]]) -> None:
    """Checks, unless their results are there. Exits where one of the rows is red."""
    if not path.exists():
        write_json(path, {"environment": environment(), "commit": commit(), **checks()})
    if red := [row for row in read_json(path)["rows"] if not row["ok"]]:
        sys.exit(f"{len(red)} checks are red, first {red[0]}: see {path}; delete it to check again")


def check_kernels() -> dict[str, Any]:
    """How many checks there were, by op, and those that are red."""
    if reason := kernels_info()["missing"]:
        return {"rows": [{"ok": False, "reason": reason}]}
    checked: Counter[str] = Counter()
    red = []
    for row in kernel_checks("cuda"):
        if not checked[row["op"]]:
            print(f"checking {row['op']}", flush=True)
        checked[row["op"]] += 1
        if not row["ok"]:
            print(row, flush=True)
            red.append(row)
    return {"checked": dict(checked), "rows": red}


def sanitize() -> dict[str, Any]:
    """What compute-sanitizer says of every kernel at small shapes: accesses outside of what was allocated."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"tool": "not there", "rows": []}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "speed.kernel_checks"]
    own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or tensors would be parts of larger allocations
    done = subprocess.run(command, cwd=HERE, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = re.findall(r"ERROR SUMMARY: .*", done.stdout)
    print(*summary, flush=True)
    row = {"ok": done.returncode == 0 and bool(summary), "summary": summary, "end": done.stdout[-2000:]}
    return {"tool": " ".join(command[1:4]), "rows": [row]}


def list_kernels() -> None:
    """What a GPU would be asked for: PyTorch stands in for kernels elsewhere, so that there is nothing to check."""
    for op in sorted(OPS):
        odd, real = (sum(case.op.name == op for case in cases) for cases in (odd_cases(), real_cases()))
        configurations = f"{len(OPS[op].configs())} configurations"
        print(f"on CUDA: {op} in {configurations}, checked at {odd} odd and {real} real shapes, timed at the latter")


def measure_kernels(output: Path, deadline: float) -> None:
    """The ops one after another, each into its JSON, unless that is there or there is no time."""
    ceiling = None
    for name in sorted(OPS):
        path = output / f"kernel_{name}.json"
        if path.exists() or time.monotonic() > deadline:
            continue
        ceiling = ceiling or measure_ceiling()
        rows = [
            row
            for case in real_cases()
            if case.op.name == name
            for batch in BATCHES
            for row in measure_case(case, batch, ceiling)
        ]
        where = {**environment(), **gpu_state()}
        write_json(path, {"environment": where, "commit": commit(), "ceiling": asdict(ceiling), "rows": rows})
        print(f"{name}: done, {sum(row['note'] is not None for row in rows)} of {len(rows)} not timed", flush=True)


def check(device: torch.device) -> list[dict[str, Any]]:
    """One row a family, kind, policy and dtype: the worst error of a plain and of an optimized forward over 4 steps."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from tiny import FAMILIES as TINY

    rows = []
    for name in FAMILIES:
        for kind in KINDS:
            for policy in POLICIES:
                for dtype in (torch.float32, torch.bfloat16):
                    row = {"family": name, "kind": kind, "policy": policy, "dtype": str(dtype).removeprefix("torch.")}
                    row |= compare(TINY[name], kind, policy, device, dtype)
                    print(row, flush=True)
                    rows.append(row)
    return rows


@torch.no_grad()
def compare(family: Any, kind: str | None, policy: Kernels | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
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
    agd.optimize(component, agd.EngineConfig(kernels=policy), spec=spec)
    run(device, dtype)  # where it captures, compiles and records
    found = run(device, dtype)
    engine = engine_of(component)
    assert engine is not None
    lost, off = (max(float((a - b).abs().max()) for a, b in zip(one, exact, strict=True)) for one in (plain, found))
    floor = torch.finfo(dtype).eps * max(float(one.abs().max()) for one in exact)
    info, failed = engine.info(), kernels_info()["failed"]
    ok = off <= 2 * lost + floor and not info["plain_because"] and not failed
    return {"plain": lost, "engine": off, "ok": ok, "failed": failed, **info}


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
