"""A gradient times a packed derivative."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import TYPES, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, dequantise, require_float, require_packed
from agd_fast.memory.ops.registry import define


def scale_unpack_ref(dy: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    """dy: n elements; codes, scales: as `pack` gives them for n elements → dy·(code·scale), contiguous, of dy's size and dtype.

    Raises: ValueError for bits, a group, codes or scales that do not fit, or a dy that is not floating point.
    """
    _require(dy, codes, scales, bits, group)
    factors = dequantise(codes, scales, dy.numel(), bits, group, computed_in(dy)).view(dy.shape)
    return (dy.contiguous() * factors).to(dy.dtype)


def scale_unpack_fake(dy: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    _require(dy, codes, scales, bits, group)
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _require(dy: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> None:
    require_float("scale_unpack", "dy", dy)
    require_packed("scale_unpack", codes, scales, 1, dy.numel(), bits, group)


def scale_unpack_cuda(dy: Tensor, codes: Tensor, scales: Tensor, bits: int, group: int) -> Tensor:
    dx = scale_unpack_fake(dy, codes, scales, bits, group)
    kernels = kernels_for("scale_unpack", dy.dtype, dy.numel(), dy, codes, scales)
    if kernels is None:
        return NotImplemented
    dy, codes, scales = dy.contiguous(), codes.contiguous(), scales.contiguous()
    addresses = dy.data_ptr(), codes.data_ptr(), scales.data_ptr(), dx.data_ptr()
    kernels.scale_unpack(*where(dy), dy.numel(), TYPES[dy.dtype], bits, group, *addresses)
    return dx


scale_unpack = define(scale_unpack_ref, scale_unpack_fake, scale_unpack_cuda)
