"""A norm's output, rebuilt from its packed normalised input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import MOST_OF_A_ROW, TYPES, address, kernels_for, where
from agd_fast.memory.ops.layout import FLOATS, dequantise, elements, expand_channels, require_affine, require_rows
from agd_fast.memory.ops.registry import define


def affine_unpack_ref(
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    size: Sequence[int],
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    """z = x̂·A + B.

    codes, scales: as `norm_pack` gives them, scales [R, ⌈n/group⌉]; A, B: float32 [R/rows_per_sample or 1, C], None for 1 and 0;
    size: of R·n elements. Row r belongs to sample ⌊r/rows_per_sample⌋, its element i to channel (r mod G)·(n/S) + ⌊i/S⌋, with
    C = G·n/S. For a layer norm G = S = 1 and rows_per_sample is the number of tokens; for a group norm rows_per_sample = G and
    S = H·W.
    → z in dtype, contiguous, of that size. Without A and B: x̂.
    Raises: ValueError naming the argument that does not fit.
    """
    _, n = _require(codes, scales, A, B, size, rows_per_sample, G, S, bits, group, dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    z = affine(dequantise(codes, scales, n, bits, group, computed), A, B, rows_per_sample, G, S)
    return z.to(dtype).view(tuple(size))


def affine(normed: Tensor, A: Tensor | None, B: Tensor | None, rows_per_sample: int, G: int, S: int) -> Tensor:
    """normed: [R, n] → normed·A + B."""
    R, n = normed.shape
    if A is not None:
        normed = normed * expand_channels(A.to(normed.dtype), R, n, rows_per_sample, G, S)
    if B is not None:
        normed = normed + expand_channels(B.to(normed.dtype), R, n, rows_per_sample, G, S)
    return normed


def affine_unpack_fake(
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    size: Sequence[int],
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    _require(codes, scales, A, B, size, rows_per_sample, G, S, bits, group, dtype)
    return torch.empty(size, dtype=dtype, device=codes.device)


def _require(
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    size: Sequence[int],
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """R, n."""
    if dtype not in FLOATS:
        raise ValueError(f"affine_unpack: dtype must be bfloat16, float16, float32 or float64, found {dtype}")
    R, n = require_rows("affine_unpack", "size", codes, scales, elements(size), bits, group)
    require_affine("affine_unpack", A, B, R, n, rows_per_sample, G, S)
    return R, n


def affine_unpack_cuda(
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    size: Sequence[int],
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    z = affine_unpack_fake(codes, scales, A, B, size, rows_per_sample, G, S, bits, group, dtype)
    kernels = kernels_for("affine_unpack", dtype, z.numel(), codes, scales, A, B)
    R = scales.shape[0]
    if kernels is None or z.numel() >= R * MOST_OF_A_ROW:
        return NotImplemented
    codes, scales = codes.contiguous(), scales.contiguous()
    A, B = float_rows(A), float_rows(B)
    shape = R, z.numel() // R, TYPES[dtype], bits, group
    addresses = codes.data_ptr(), scales.data_ptr(), address(A), stride(A), address(B), stride(B)
    kernels.affine_unpack(*where(z), *shape, *addresses, rows_per_sample, G, S, z.data_ptr())
    return z


def float_rows(values: Tensor | None) -> Tensor | None:
    """[samples or 1, C], in float32, contiguous."""
    return None if values is None else values.float().contiguous()


def stride(values: Tensor | None) -> int:
    """Elements between samples of [samples or 1, C]; 0 if one row is for all."""
    return 0 if values is None or values.shape[0] == 1 else values.shape[1]


affine_unpack = define(affine_unpack_ref, affine_unpack_fake, affine_unpack_cuda)
