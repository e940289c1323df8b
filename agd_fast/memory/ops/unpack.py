"""What `pack` packed, as a tensor again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import TYPES, kernels_for, where
from agd_fast.memory.ops.layout import FLOATS, dequantise, elements, require_packed
from agd_fast.memory.ops.registry import define


def unpack_ref(codes: Tensor, scales: Tensor, size: Sequence[int], bits: int, group: int, dtype: torch.dtype) -> Tensor:
    """codes: uint8 [⌈n·bits/8⌉]; scales: bfloat16 [⌈n/group⌉]; size: of n elements → code·scale in dtype, contiguous, of size.

    Raises: ValueError for bits, a group, codes, scales or a dtype that do not fit.
    """
    _require(codes, scales, size, bits, group, dtype)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    return dequantise(codes, scales, elements(size), bits, group, computed).to(dtype).view(tuple(size))


def unpack_fake(codes: Tensor, scales: Tensor, size: Sequence[int], bits: int, group: int, dtype: torch.dtype) -> Tensor:
    _require(codes, scales, size, bits, group, dtype)
    return torch.empty(size, dtype=dtype, device=codes.device)


def _require(codes: Tensor, scales: Tensor, size: Sequence[int], bits: int, group: int, dtype: torch.dtype) -> None:
    require_packed("unpack", codes, scales, 1, elements(size), bits, group)
    if dtype not in FLOATS:
        raise ValueError(f"unpack: dtype must be bfloat16, float16, float32 or float64, found {dtype}")


def unpack_cuda(codes: Tensor, scales: Tensor, size: Sequence[int], bits: int, group: int, dtype: torch.dtype) -> Tensor:
    y = unpack_fake(codes, scales, size, bits, group, dtype)
    kernels = kernels_for("unpack", dtype, y.numel(), codes, scales)
    if kernels is None:
        return NotImplemented
    codes, scales = codes.contiguous(), scales.contiguous()
    addresses = codes.data_ptr(), scales.data_ptr(), y.data_ptr()
    kernels.unpack(*where(y), y.numel(), TYPES[dtype], bits, group, *addresses)
    return y


unpack = define(unpack_ref, unpack_fake, unpack_cuda)
