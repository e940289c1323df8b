"""Is the engine right on this card? The tiny denoisers of tests/tiny, compiled and as one CUDA graph a step, against float64.

python -m speed.engine_checks --family sdxl --json checks.json    # in bench/
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, scoped, spec_of
from agd_fast.engine import engine_of
from agd_fast.ops import Kernels, kernels_info
from agd_fast.warning import described
from speed.checking import all_right

FAMILIES = ("sdxl", "dit", "sd3", "pixart", "wan", "sd15", "qwenimage", "sana", "auraflow")
OMEGAS = (2.0, 5.0)
SETTINGS: tuple[tuple[str | None, Kernels, torch.dtype], ...] = (  # kind of adapter, kernels, dtype
    (None, "never", torch.float32),
    (None, "always", torch.bfloat16),
    (None, "auto", torch.bfloat16),
    ("cross_attention", "always", torch.bfloat16),
)


def check(name: str, device: str, setting: tuple[str | None, Kernels, torch.dtype]) -> dict[str, Any]:
    """The worst error of a plain and of an optimized forward over the steps of a run."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from tiny import FAMILIES as TINY

    kind, policy, dtype = setting
    row = {"family": name, "kind": kind, "policy": policy, "dtype": str(dtype).removeprefix("torch.")}
    try:
        return row | compare(TINY[name], kind, policy, torch.device(device), dtype)
    except Exception as error:  # a red row, not the end of the checks
        return row | {"ok": False, "reason": described(error)}


@torch.no_grad()
def compare(family: Any, kind: str | None, policy: Kernels, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
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
    agd.optimize(component, agd.EngineConfig(kernels=policy, gelu_epilogue=policy != "always"), spec=spec)
    run(device, dtype)  # the run that captures, compiles and records
    found = run(device, dtype)
    engine = engine_of(component)
    assert engine is not None
    lost, off = (max(float((a - b).abs().max()) for a, b in zip(one, exact, strict=True)) for one in (plain, found))
    floor = torch.finfo(dtype).eps * max(float(one.abs().max()) for one in exact)
    info, failed = engine.info(), kernels_info()["failed"]
    ok = off <= 2 * lost + floor and not info["plain_because"] and not failed
    return {"plain": lost, "engine": off, "floor": floor, "ok": ok, "failed": failed, **info}


def moved(calls: list[Any], device: torch.device, dtype: torch.dtype) -> Any:
    """Calls moved to a device and dtype, timesteps keeping theirs; a tensor that calls share stays shared."""
    found: dict[int, torch.Tensor] = {}

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in found:
            found[id(leaf)] = leaf.to(device, dtype if leaf.is_floating_point() and leaf.ndim > 1 else leaf.dtype)
        return found[id(leaf)]

    return pytree.tree_map(one, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    checks = [partial(check, args.family, args.device, setting) for setting in SETTINGS]
    sys.exit(not all_right(checks, len(SETTINGS), args.json))  # at the same time: most of each check is compilation


if __name__ == "__main__":
    main()
