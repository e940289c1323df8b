"""A tensor as codes and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import TYPES, kernels_for, where
from agd_fast.memory.ops.layout import pitch, quantise, require_float, require_packing
from agd_fast.memory.ops.registry import define


def pack_ref(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """x: n elements, any shape → codes uint8 [⌈n·bits/8⌉], scales bfloat16 [⌈n/group⌉].

    Raises: ValueError for bits other than 4 or 8, a group other than 32, 64 or 128, or an x that is not floating point.
    """
    _require(x, bits, group)
    codes, scales = quantise(x.reshape(1, -1), bits, group)
    return codes[0], scales[0]


def pack_fake(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    _require(x, bits, group)
    return empty_packed(x, bits, group)


def empty_packed(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Codes and scales for as many elements as x has, unwritten."""
    n = x.numel()
    codes = torch.empty(pitch(n, bits), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((n + group - 1) // group, dtype=torch.bfloat16, device=x.device)


def _require(x: Tensor, bits: int, group: int) -> None:
    require_packing("pack", bits, group)
    require_float("pack", "x", x)


def pack_cuda(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes, scales = pack_fake(x, bits, group)
    kernels = kernels_for("pack", x.dtype, x.numel(), x)
    if kernels is None:
        return NotImplemented
    x = x.contiguous()
    addresses = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
    kernels.pack(*where(x), x.numel(), TYPES[x.dtype], bits, group, *addresses)
    return codes, scales


pack = define(pack_ref, pack_fake, pack_cuda)
