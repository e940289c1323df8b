"""How values are packed into bytes, in plain torch: groups, scales, codes, rows; and checks of an op's arguments.

A group is `group` consecutive elements; the last of a row may be shorter. A value is a level times its group's scale, with which
the levels reach from the group's largest value to its smallest. In 8 bits the levels are −127 … 127, and a code is an int8. In 4
bits a code is a nibble, element 2i the low one of a byte and 2i + 1 the high one, and a group takes the set of levels that needs
the smaller scale:

    even    0, ±1, ±2, ±3, ±4, ±6, ±8, ±10; the nibble is the level's place among them, plus 8
    sided   −2 … 13, suited to activations and their derivatives; the nibble is the level plus 2; the scale's sign is set

A scale is rounded up to bfloat16 and is at least 2⁻¹⁰⁰, so that a reciprocal and a remainder stay normal numbers; it is 0 for a
group of zeros, NaN for one with a NaN or an infinity. x/scale is rounded to the nearest level, ties to even places. Arithmetic
is in float32, or in float64 for float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

BITS = (4, 8)
GROUPS = (32, 64, 128)
SMALLEST_SCALE = 2.0**-100
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def quantise(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """x: [R, n] → codes uint8 [R, ⌈n·bits/8⌉], scales bfloat16 [R, ⌈n/group⌉]."""
    R, n = x.shape
    groups = -(-n // group)
    values = F.pad(x.to(computed_in(x)), (0, groups * group - n)).view(R, groups, group)
    scales = scales_of(values.amax(-1), values.amin(-1), bits)
    levels = values / scales.abs().to(values.dtype).masked_fill(scales == 0, 1).unsqueeze(-1)
    if bits == 8:
        codes = levels.round().nan_to_num(0, 0, 0).to(torch.int8).view(torch.uint8).view(R, groups * group)
    else:
        size = levels.abs()
        even = torch.minimum(size, size / 2 + 2).copysign(levels).round() + 8
        nibbles = torch.where(scales.signbit().unsqueeze(-1), levels.round() + 2, even)
        nibbles = nibbles.nan_to_num(8, 8, 8).to(torch.uint8).view(R, groups * group)
        codes = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return codes[:, : pitch(n, bits)].contiguous(), scales


def dequantise(codes: Tensor, scales: Tensor, n: int, bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """codes: of R·⌈n·bits/8⌉ bytes; scales: of R rows → level·scale [R, n], exactly, in float32 or float64."""
    R = scales.numel() // groups if (groups := -(-n // group)) else 0
    codes = codes.view(R, pitch(n, bits))
    steps = scales.view(R, groups).to(dtype).repeat_interleave(group, dim=1)[:, :n]
    if bits == 8:
        levels = codes.view(torch.int8).to(dtype)
    else:
        nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)[:, :n].to(dtype)
        places = nibbles - 8
        levels = torch.where(steps.signbit(), nibbles - 2, 2 * places - places.clamp(-4, 4))
    return levels * steps.abs()


def scales_of(largest: Tensor, smallest: Tensor, bits: int) -> Tensor:
    """largest, smallest: the groups' extreme values, float32 or float64 → bfloat16 of the same shape."""
    magnitude = torch.maximum(largest, -smallest)
    if bits == 8:
        scales = _round_up(magnitude * (1 / 127))  # as CUDA divides by a number
    else:
        even, sided = _round_up(magnitude * (1 / 10)), _round_up(torch.maximum(largest * (1 / 13), smallest * (-1 / 2)))
        scales = torch.where(sided < even, -sided, even)
    return scales.masked_fill(magnitude == 0, 0).masked_fill(~magnitude.isfinite(), torch.nan)


def _round_up(quotient: Tensor) -> Tensor:
    bits = quotient.float().clamp(min=SMALLEST_SCALE).view(torch.int32)
    return (bits + 0xFFFF >> 16).to(torch.int16).view(torch.bfloat16)


def pitch(n: int, bits: int) -> int:
    """Bytes of n codes."""
    return (n * bits + 7) // 8


def computed_in(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rows_like(x: Tensor, statistics: Tensor) -> Tensor:
    """x as [R, n], R the number of statistics."""
    R = statistics.numel()
    return x.reshape(R, x.numel() // R if R else 0)


def expand_channels(values: Tensor, R: int, n: int, rows_per_sample: int, G: int, S: int) -> Tensor:
    """values: [B or 1, C] → [R, n]: row r is of sample ⌊r/rows_per_sample⌋, element i of channel (r mod G)·(n/S) + ⌊i/S⌋."""
    samples = torch.arange(R, device=values.device) // rows_per_sample if values.shape[0] > 1 else None
    by_row = values.expand(R, -1) if samples is None else values[samples]
    own = by_row.view(R, G, n // S)[torch.arange(R, device=values.device), torch.arange(R, device=values.device) % G]
    return own.repeat_interleave(S, dim=1)


def require_packing(op: str, bits: int, group: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{op}: bits must be 4 or 8, found {bits}")
    if group not in GROUPS:
        raise ValueError(f"{op}: group must be one of {GROUPS}, found {group}")


def require_float(op: str, name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be bfloat16, float16, float32 or float64, found {x.dtype}")


def require_packed(
    op: str, codes: Tensor, scales: Tensor, R: int, n: int, bits: int, group: int, names: str = "codes scales"
) -> None:
    """Check that there are as many codes and scales as R rows of n elements take."""
    require_packing(op, bits, group)
    name, name_of_scales = names.split()
    if codes.dtype != torch.uint8 or codes.numel() != R * pitch(n, bits):
        wanted = f"uint8, {R * pitch(n, bits)} elements"
        raise ValueError(f"{op}: {name} must be {wanted}, found {codes.dtype}, {codes.numel()} elements")
    if scales.dtype != torch.bfloat16 or scales.numel() != R * -(-n // group):
        wanted = f"bfloat16, {R * -(-n // group)} elements"
        raise ValueError(f"{op}: {name_of_scales} must be {wanted}, found {scales.dtype}, {scales.numel()} elements")


def require_statistics(op: str, name: str, statistics: Tensor, x: Tensor) -> int:
    """n, the elements per row of x, with a row per element of `statistics`, which is float32, or float64 if x is."""
    if statistics.dtype not in (torch.float32, computed_in(x)):
        raise ValueError(f"{op}: {name} must be float32, found {statistics.dtype}")
    R, total = statistics.numel(), x.numel()
    if total % R if R else total:
        raise ValueError(f"{op}: {name} must have one element a row of {list(x.shape)}, found {list(statistics.shape)}")
    return total // R if R else 0


def require_rows(op: str, name: str, codes: Tensor, scales: Tensor, total: int, bits: int, group: int) -> tuple[int, int]:
    """R, n: the rows of `scales`, and the elements per row, of `total`. name: the argument that has `total` elements."""
    require_packing(op, bits, group)
    if scales.ndim != 2:
        raise ValueError(f"{op}: scales must be [R, ⌈n/{group}⌉], found {list(scales.shape)}")
    R = scales.shape[0]
    if total % R if R else total:
        raise ValueError(f"{op}: {name} must have a multiple of the {R} rows in scales, found {total} elements")
    n = total // R if R else 0
    require_packed(op, codes, scales, R, n, bits, group)
    return R, n


def require_channels(op: str, R: int, n: int, G: int, S: int) -> int:
    """C = G·n/S, the channels of R rows of n elements."""
    if G < 1 or R % G:
        raise ValueError(f"{op}: G must divide the {R} rows, found {G}")
    if S < 1 or n % S:
        raise ValueError(f"{op}: S must divide a row's {n} elements, found {S}")
    return G * (n // S)


def require_affine(op: str, A: Tensor | None, B: Tensor | None, R: int, n: int, rows_per_sample: int, G: int, S: int) -> None:
    """Check that A and B are [R/rows_per_sample or 1, C] of float32, or float64 for float64."""
    C = require_channels(op, R, n, G, S)
    if rows_per_sample < 1 or R % rows_per_sample or rows_per_sample % G:
        raise ValueError(f"{op}: rows_per_sample must divide the {R} rows and be a multiple of G = {G}, found {rows_per_sample}")
    samples = R // rows_per_sample
    for name, values in (("A", A), ("B", B)):
        if values is None:
            continue
        if values.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} must be float32, found {values.dtype}")
        if values.ndim != 2 or values.shape[0] not in (1, samples) or values.shape[1] != C:
            raise ValueError(f"{op}: {name} must be [{samples} or 1, {C}], found {list(values.shape)}")


def elements(size: Sequence[int]) -> int:
    return math.prod(size)
