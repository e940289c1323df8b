"""A gradient through the SiLU after a norm, from the norm's packed normalised input."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.activations import silu_derivative
from agd_fast.memory.ops.affine_unpack import affine, float_rows, stride
from agd_fast.memory.ops.launching import MOST_OF_A_ROW, TYPES, address, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, dequantise, require_affine, require_float, require_rows
from agd_fast.memory.ops.registry import define


def silu_affine_backward_ref(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    """dy·silu′(x̂·A + B): the gradient of the norm's output, from dy, the gradient of SiLU's output.

    dy: R·n elements, rows in memory order; the others as in `affine_unpack` → contiguous, of dy's size and dtype.
    Raises: ValueError naming the argument that does not fit.
    """
    _, n = _require(dy, codes, scales, A, B, rows_per_sample, G, S, bits, group)
    z = affine(dequantise(codes, scales, n, bits, group, computed_in(dy)), A, B, rows_per_sample, G, S)
    return (dy.contiguous() * silu_derivative(z).view(dy.shape)).to(dy.dtype)


def silu_affine_backward_fake(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    _require(dy, codes, scales, A, B, rows_per_sample, G, S, bits, group)
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _require(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> tuple[int, int]:
    """R, n."""
    require_float("silu_affine_backward", "dy", dy)
    R, n = require_rows("silu_affine_backward", "dy", codes, scales, dy.numel(), bits, group)
    require_affine("silu_affine_backward", A, B, R, n, rows_per_sample, G, S)
    return R, n


def silu_affine_backward_cuda(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    A: Tensor | None,
    B: Tensor | None,
    rows_per_sample: int,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    dx = silu_affine_backward_fake(dy, codes, scales, A, B, rows_per_sample, G, S, bits, group)
    kernels = kernels_for("silu_affine_backward", dy.dtype, dy.numel(), dy, codes, scales, A, B)
    R = scales.shape[0]
    if kernels is None or dy.numel() >= R * MOST_OF_A_ROW:
        return NotImplemented
    dy, codes, scales = dy.contiguous(), codes.contiguous(), scales.contiguous()
    A, B = float_rows(A), float_rows(B)
    shape = R, dy.numel() // R, TYPES[dy.dtype], bits, group
    addresses = dy.data_ptr(), codes.data_ptr(), scales.data_ptr(), address(A), stride(A), address(B), stride(B)
    kernels.silu_affine_backward(*where(dy), *shape, *addresses, rows_per_sample, G, S, dx.data_ptr())
    return dx


silu_affine_backward = define(silu_affine_backward_ref, silu_affine_backward_fake, silu_affine_backward_cuda)
