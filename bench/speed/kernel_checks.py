"""Are the kernels right on this card? Every op with every configuration, dtype and many shapes against float64.

python -m speed.kernel_checks --odd                              # in bench/: small enough for compute-sanitizer
python -m speed.kernel_checks --op gated_lora --json checks.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.ops import OPS, kernels_info
from agd_fast.ops.exactness import off
from agd_fast.warning import described
from nfe_speed import commit
from speed.kernels import Case, Random, Row, odd_cases, real_cases

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BATCHES = (1, 4, 64)
SLICED = 4  # the batch at which rows also begin at unaligned addresses
LARGEST = 2**29  # most bytes of the arguments in float64: larger cases are left to kernel_speeds, which checks what it times


def checks(
    op: str | None,
    device: torch.device | str,
    batches: Iterable[int] = BATCHES,
    dtypes: Iterable[torch.dtype] = DTYPES,
    *,
    odd: bool = False,
) -> Iterator[Row]:
    """One row per case, batch, dtype, layout and configuration, of one op or all; red if not ok. odd: no shapes of models."""
    for case in [*odd_cases(), *([] if odd else real_cases())]:
        if op is not None and case.op.name != op:
            continue
        for batch in batches:
            for dtype in dtypes:
                for sliced in (False, True) if batch == SLICED else (False,):
                    yield from check_case(case, batch, dtype, device, sliced=sliced)


@torch.no_grad()
def check_case(case: Case, batch: int, dtype: torch.dtype, device: torch.device | str, *, sliced: bool = False) -> Iterator[Row]:
    """One row per configuration; none if the case would be too large."""
    meta = case.arguments(Meta(dtype), batch)
    if sum(8 * one.numel() for one in meta if isinstance(one, Tensor)) > LARGEST:
        return
    args = case.arguments(Random(dtype, device, sliced=sliced), batch)
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    plain, exact = case.op.reference(*args), case.op.reference(*case.op.in_double(args))
    for config in case.op.configs():
        try:
            with poisoned():
                found = case.op.kernel()(*args, config=config)
            reason = off(found, plain, exact)
            changed = [index for index, arg in enumerate(args) if isinstance(arg, Tensor) and not torch.equal(arg, before[index])]
            for index in changed:
                args[index].copy_(before[index])
            reason = f"arguments {changed} were changed" if changed else reason
        except Exception as error:  # failed compilation is a red row, not the end of the checks
            reason = described(error)
        yield {
            "op": case.op.name,
            "shape": case.shape,
            "batch": batch,
            "dtype": str(dtype).removeprefix("torch."),
            "sliced": sliced,
            "config": dict(config),
            "ok": not reason,
            "reason": reason,
        }


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills new allocations with NaN instead of what an earlier launch left there."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Meta(Random):
    """Meta tensors: only shapes, no values."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), help="default: all")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES], help="default: all")
    parser.add_argument("--odd", action="store_true", help="only the odd shapes, at two batches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="write what is red to this file")
    args = parser.parse_args()
    if args.device == "cuda" and (reason := kernels_info()["missing"]):
        parser.error(f"expected kernels that run, found none: {reason}")
    dtypes = [getattr(torch, args.dtype)] if args.dtype else DTYPES
    found = list(checks(args.op, args.device, (1, 4) if args.odd else BATCHES, dtypes, odd=args.odd))
    red = [row for row in found if not row["ok"]]
    print(f"{len(found)} kernel checks, {len(red)} red{f', first {json.dumps(red[0])}' if red else ''}")
    if args.json:
        write_json(args.json, {"environment": environment(), "commit": commit(), "checked": len(found), "rows": red})
    sys.exit(bool(red))


if __name__ == "__main__":
    main()
