"""Are the packing kernels right on this card, and how much of its bandwidth do they use?

AGD_FAST_CUDA_ARCHS=90 python setup.py build_ext --inplace    # in the repository's root, if the extension is not installed
python bench/packing_kernels.py                  # checks, then bench/results/gpu/packing_kernels.json
python bench/packing_kernels.py --check-only     # small odd shapes alone, for compute-sanitizer

Every op, in bfloat16, float16 and float32, in 4 and 8 bits, at odd shapes, lengths and addresses and at those of SDXL at 1024².
Packed tensors and norms must equal the reference's bit for bit. A packed derivative may be off float64 by half a step plus twice
PyTorch's error in float32; so may its scale. Gradients are held to the same rule in their own dtype. Nothing is timed while a
check is red. A time is of one call in a CUDA graph of calls on different inputs, more than L2 holds.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.memory import ops
from agd_fast.memory.extension import extension_info, extension_on
from agd_fast.memory.ops.activations import gelu_derivative, silu_derivative
from agd_fast.memory.ops.layout import GROUPS, SMALLEST_SCALE
from agd_fast.ops.exactness import off
from agd_fast.ops.registry import tensors_of
from agd_fast.warning import described
from nfe_speed import commit
from speed.hardware import gpu_state
from speed.kernel_checks import poisoned
from speed.kernels import L2, Ceiling, Pass, measure_ceiling, time_passes, traffic

Arguments = tuple[Any, ...]
Row = dict[str, Any]
Launchers = Mapping[str, Callable[..., Any]]
RESULT = Path(__file__).parent / "results" / "gpu" / "packing_kernels.json"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GROUP, BATCHES, ROUNDS, MOST_INPUTS = 64, (1, 4), 20, 32
FLAT, NORMS = ("pack", "unpack", "scale_unpack"), ("norm_pack", "norm_backward", "affine_unpack", "silu_affine_backward")
GATED, ACTIVATIONS = ("geglu_pack", "swiglu_pack", "geglu_backward"), ("gelu_pack", "silu_pack")
DERIVED = {"gelu_pack", "silu_pack", "geglu_pack", "swiglu_pack"}  # what they pack is computed with an erf, tanh or exp
WHOLE, SHARED, BARE = range(3)  # γ in x's dtype, A and B per sample; γ in float32, one A, no B; none of them, no mean


@dataclass(frozen=True)
class Case:
    """An op at a size: [..., D], or [B, C, H, W] in `groups`."""

    op: str
    size: tuple[int, ...]
    groups: int = 0
    variant: int = WHOLE

    @property
    def layout(self) -> tuple[int, int, int]:
        """Rows per sample, G, S."""
        if self.groups:
            return self.groups, self.groups, math.prod(self.size[2:])
        return math.prod(self.size[1:-1]), 1, 1

    @property
    def rows(self) -> int:
        return self.size[0] * self.layout[0]

    @property
    def channels(self) -> int:
        return self.size[1] if self.groups else self.size[-1]


class Random:
    """Random contiguous tensors that begin `offset` elements after an aligned address."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0, offset: int = 0) -> None:
        self.dtype, self.device, self.offset = dtype, device, offset
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.placed(torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype))

    def placed(self, x: Tensor) -> Tensor:
        if not self.offset:
            return x
        room = torch.empty(x.numel() + self.offset, dtype=x.dtype, device=x.device)
        return room[self.offset :].view(x.shape).copy_(x)


def arguments(case: Case, new: Random, bits: int, group: int) -> Arguments:
    """Arguments of the case's op."""

    def packed(reference: str, *args: Any) -> list[Tensor]:
        return [new.placed(one) for one in ops.REFERENCES[reference](*args, bits, group)]

    op, size = case.op, case.size
    if op in ("geglu_pack", "swiglu_pack"):
        a, g = new(*size[:-1], 2 * size[-1]).chunk(2, -1)
        return (a, g, "none", bits, group) if op == "geglu_pack" else (a, g, bits, group)
    x = new(*size)
    if op in ("pack", "silu_pack"):
        return x, bits, group
    if op == "gelu_pack":
        return x, "none" if case.variant == WHOLE else "tanh", bits, group
    if op == "unpack":
        return *packed("pack", x), list(size), bits, group, new.dtype
    if op == "scale_unpack":
        return x, *packed("pack", new(*size)), bits, group
    if op == "geglu_backward":
        return x, *packed("geglu_pack", new(*size), new(*size), "none"), bits, group
    rstd = new(case.rows, dtype=torch.float32).abs() + 0.5
    mean = None if case.variant == BARE else new(case.rows, dtype=torch.float32)
    if op == "norm_pack":
        return x, mean, rstd, bits, group
    rows = packed("norm_pack", new(*size), mean, rstd)
    if op == "norm_backward":
        gamma = None if case.variant == BARE else new(case.channels, dtype=None if case.variant == WHOLE else torch.float32)
        return x, *rows, rstd, gamma, case.variant != BARE, *case.layout[1:], bits, group
    A = None if case.variant == BARE else new(1 if case.variant == SHARED else size[0], case.channels, dtype=torch.float32)
    B = new(size[0], case.channels, dtype=torch.float32) if case.variant == WHOLE else None
    if op == "affine_unpack":
        return *rows, A, B, list(size), *case.layout, bits, group, new.dtype
    return x, *rows, A, B, *case.layout, bits, group


def odd_cases() -> Iterator[Case]:
    """Lengths that do not fill a chunk, group or block, rows at unaligned addresses, rows too long for a block."""
    flat = ((1, 1), (5,), (3, 33), (2, 7, 320), (1, 40, 1001))
    for op in (*FLAT, *GATED, *ACTIVATIONS):
        yield from (Case(op, size, variant=variant) for size in flat for variant in ((0, 1) if op == "gelu_pack" else (0,)))
    rows = ((1, 3, 1), (2, 5, 33), (2, 7, 320), (3, 2, 1000), (1, 2, 5120), (2, 17, 64), (1, 2, 8200))
    images = ((2, 6, 5, 7, 3), (1, 32, 1, 1, 32), (2, 64, 9, 9, 32), (1, 40, 33, 31, 2), (1, 8, 64, 64, 2))
    for op in NORMS:
        for variant in (WHOLE, SHARED, BARE):
            yield from (Case(op, size, variant=variant) for size in rows)
            yield from (Case(op, size, groups, variant) for *size, groups in images)  # type: ignore[arg-type]


def real_cases(batch: int) -> Iterator[Case]:
    """Shapes of SDXL at 1024², or of SD3's feed-forward for ops that SDXL does not have."""
    tokens = ((batch, 4096, 640), (batch, 1024, 1280))
    images = ((batch, 320, 128, 128), (batch, 640, 64, 64), (batch, 1280, 32, 32))
    for op in FLAT:
        yield from (Case(op, size) for size in tokens)
    for op in GATED:
        yield from (Case(op, (*size[:-1], 4 * size[-1])) for size in tokens)
    yield from (Case(op, (batch, 4096, 6144)) for op in ACTIVATIONS)
    for op in NORMS:
        if op != "silu_affine_backward":
            yield from (Case(op, size) for size in tokens)
        yield from (Case(op, size, 32) for size in images)


def checks(device: str, small: bool, launchers: Launchers) -> Iterator[Row]:
    """launchers: what is checked, by op. small: no real sizes."""
    for index, case in enumerate(odd_cases()):
        for dtype in DTYPES:
            for bits in (4, 8):
                group, offset = GROUPS[(index + bits) % 3], (0, 1, 4)[index % 3]
                yield checked(case, dtype, bits, group, offset, device, launchers)
    for case in () if small else real_cases(1):
        for dtype in DTYPES:
            yield from (checked(case, dtype, bits, GROUP, 0, device, launchers) for bits in (4, 8))


@torch.no_grad()
def checked(case: Case, dtype: torch.dtype, bits: int, group: int, offset: int, device: str, launchers: Launchers) -> Row:
    """What was checked, whether it is ok, and if not, why."""
    args = arguments(case, Random(dtype, device, offset=offset), bits, group)
    before = [one.clone() for one in tensors_of(args)]
    try:
        with poisoned():
            found = launchers[case.op](*args)
        reason = "the extension does not take it" if found is NotImplemented else wrong(case.op, args, found, bits, group)
        if any(not torch.equal(one, was) for one, was in zip(tensors_of(args), before, strict=True)):
            reason = "an argument was changed"
    except Exception as error:  # the others are checked all the same
        reason = described(error)
    row = {"op": case.op, "size": list(case.size), "groups": case.groups, "variant": case.variant, "offset": offset}
    return row | {"dtype": str(dtype), "bits": bits, "group": group, "ok": not reason, "reason": reason}


def wrong(op: str, args: Arguments, found: Any, bits: int, group: int) -> str:
    """Why a result is wrong; empty if it is right."""
    reference = ops.REFERENCES[op]
    if op in DERIVED:
        exact, plain = factors(op, args, torch.float64), factors(op, args, torch.float32)
        parts = zip(found[0::2], found[1::2], exact, plain, strict=True)
        return "; ".join(filter(None, (derived_wrong(*part, bits, group) for part in parts)))
    plain = reference(*args)
    if op in ("pack", "norm_pack", "unpack"):
        pairs = zip(*map(tensors_of, (found, plain)), strict=True)
        differ = [int((one.view(torch.uint8) != own.view(torch.uint8)).sum()) for one, own in pairs]
        return f"{differ} bytes differ" if any(differ) else ""
    return off(found, plain, reference(*in_double(reference, args)))


def in_double(reference: Callable[..., Any], args: Arguments) -> Arguments:
    """The same arguments, with what is not packed in float64, and so the result."""
    names = inspect.signature(reference).parameters
    wide = {"dy", "gamma", "A", "B"}
    doubled = [one.double() if name in wide and isinstance(one, Tensor) else one for name, one in zip(names, args, strict=True)]
    return tuple(torch.float64 if name == "dtype" else one for name, one in zip(names, doubled, strict=True))


def factors(op: str, args: Arguments, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What the op packs, flat."""
    x = args[0].to(dtype).flatten()
    if op in ("gelu_pack", "silu_pack"):
        return (gelu_derivative(x, args[1]) if op == "gelu_pack" else silu_derivative(x),)
    g = args[1].to(dtype).flatten()
    if op == "geglu_pack":
        return F.gelu(g, approximate=args[2]), x * gelu_derivative(g, args[2])
    return F.silu(g), x * silu_derivative(g)


def derived_wrong(codes: Tensor, scales: Tensor, exact: Tensor, plain: Tensor, bits: int, group: int) -> str:
    """exact, plain: the values to pack, in float64 and as torch computes them in float32."""
    n = exact.numel()
    allowed = 2 * float((plain.double() - exact).abs().max()) + torch.finfo(torch.float32).eps * float(exact.abs().max())
    steps, sided = (one.repeat_interleave(group)[:n] for one in (scales.double().abs(), scales.signbit()))
    gaps = steps * (1 + 2.0**-17) * torch.where((exact.abs() > 4 * steps) & ~sided & (bits == 4), 1, 0.5)
    over = (ops.unpack_ref(codes, scales, [n], bits, group, torch.float64) - exact).abs() - gaps - allowed
    groups = F.pad(exact, (0, len(scales) * group - n)).view(-1, group)
    above, below = groups.amax(-1), -groups.amin(-1)
    least, most = (
        scale_for(above + off, below + off, bits) * (1 + 2.0**-22) ** math.copysign(1, off) for off in (-allowed, allowed)
    )
    smaller = (scales.view(torch.int16) - 1).view(torch.bfloat16).double().abs()  # the next smaller bfloat16
    steps = scales.double().abs()
    fits = (steps >= least) & ((smaller <= most) | (steps <= SMALLEST_SCALE))
    if float(over.max()) > 0:
        return f"a value is off by {float(over.max()):.3g} more than half a step and {allowed:.3g}"
    return "" if bool(fits.all()) else f"{int((~fits).sum())} scales are not those of their groups"


def scale_for(above: Tensor, below: Tensor, bits: int) -> Tensor:
    """The scale of groups that reach this far above and below 0, before rounding up."""
    largest = torch.maximum(above, below)
    return largest / 127 if bits == 8 else torch.minimum(largest / 10, torch.maximum(above / 13, below / 2))


@torch.no_grad()
def timed(case: Case, bits: int, ceiling: Ceiling) -> Row:
    """ms and GB/s of one call in bfloat16, beside a copy's."""
    op: Callable[..., Any] = getattr(ops, case.op)
    first = arguments(case, Random(torch.bfloat16, "cuda"), bits, GROUP)
    moved = traffic(first, op(*first))
    count = min(max(2, math.ceil(L2 / moved)), MOST_INPUTS)
    inputs = [first] + [arguments(case, Random(torch.bfloat16, "cuda", seed), bits, GROUP) for seed in range(1, count)]
    calls = Pass(op, inputs)
    low, median, high = (ms / calls.calls for ms in time_passes({"kernel": calls}, ROUNDS)["kernel"])
    row = {"op": case.op, "size": list(case.size), "groups": case.groups, "bits": bits, "group": GROUP, "dtype": "bfloat16"}
    row |= {"bytes": moved, "ms": median, "ms_p20": low, "ms_p80": high, "gb_per_s": moved / median / 1e6}
    return row | {"share_of_copy": moved / ceiling.bandwidth * 1e3 / median, "inputs": count}


@torch.no_grad()
def call_overheads() -> dict[str, float]:
    """Microseconds of CPU time per call of each op, on little data."""
    found = {}
    for op in sorted(ops.REFERENCES):
        case = Case(op, (2, 8, 4, 4), 2) if op in NORMS else Case(op, (8, 32))
        args, call = arguments(case, Random(torch.bfloat16, "cuda"), 8, GROUP), getattr(ops, op)
        for calls in (50, 500):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call(*args)
            found[op] = (time.perf_counter() - start) / calls * 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-only", action="store_true", help="small odd shapes, no times, no file")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the references against themselves")
    parser.add_argument("--json", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    if args.device == "cuda" and extension_on(torch.cuda.current_device()) is None:
        parser.error(f"expected agd_fast._cuda with code for this card, found {extension_info()}")
    start, counts, red = time.perf_counter(), Counter[str](), []
    launchers = ops.LAUNCHERS if args.device == "cuda" else ops.REFERENCES
    for row in checks(args.device, args.check_only or args.device == "cpu", launchers):
        counts[row["op"]] += 1
        if not row["ok"]:
            red.append(row)
            print(json.dumps(row), flush=True)
    print(f"{counts.total()} checks of {len(counts)} ops, {len(red)} red, {time.perf_counter() - start:.0f} s", flush=True)
    if args.check_only or args.device == "cpu":
        sys.exit(bool(red))
    found: dict[str, Any] = {"environment": {**environment(), **gpu_state()}, "extension": extension_info(), "commit": commit()}
    found |= {"checked": dict(counts), "red": red, "rows": []}
    if not red:
        ceiling = measure_ceiling()
        found |= {"ceiling": asdict(ceiling), "call_us": call_overheads()}
        for batch in BATCHES:
            for case in real_cases(batch):
                found["rows"] += [timed(case, bits, ceiling) for bits in (4, 8)]
                row = found["rows"][-1]
                print(f"{row['op']} {row['size']}: {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.2f} of a copy", flush=True)
    write_json(args.json, found)
    print(f"{args.json}, {time.perf_counter() - start:.0f} s")
    sys.exit(bool(red))


if __name__ == "__main__":
    main()
