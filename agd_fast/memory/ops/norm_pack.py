"""The normalised input of a norm, packed."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import MOST_OF_A_ROW, TYPES, address, kernels_for, where
from agd_fast.memory.ops.layout import (
    computed_in,
    pitch,
    quantise,
    require_float,
    require_packing,
    require_statistics,
    rows_like,
)
from agd_fast.memory.ops.registry import define


def norm_pack_ref(x: Tensor, mean: Tensor | None, rstd: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """x̂ = (x − mean)·rstd, packed row by row: each row begins a new group and a new byte.

    x: R·n elements, rows in memory order; mean, rstd: R elements of float32, any shape; mean None for an RMS norm
    → codes uint8 [R, ⌈n·bits/8⌉], scales bfloat16 [R, ⌈n/group⌉].
    Raises: ValueError for bits, a group, an x that is not floating point, or statistics that are not one per row.
    """
    _require(x, mean, rstd, bits, group)
    rows = rows_like(x, rstd).to(computed_in(x))
    centred = rows if mean is None else rows - mean.reshape(-1, 1)
    return quantise(centred * rstd.reshape(-1, 1), bits, group)


def norm_pack_fake(x: Tensor, mean: Tensor | None, rstd: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    R, n = _require(x, mean, rstd, bits, group)
    codes = torch.empty((R, pitch(n, bits)), dtype=torch.uint8, device=x.device)
    return codes, torch.empty((R, (n + group - 1) // group), dtype=torch.bfloat16, device=x.device)


def _require(x: Tensor, mean: Tensor | None, rstd: Tensor, bits: int, group: int) -> tuple[int, int]:
    require_packing("norm_pack", bits, group)
    require_float("norm_pack", "x", x)
    n = require_statistics("norm_pack", "rstd", rstd, x)
    if mean is not None:
        require_statistics("norm_pack", "mean", mean, x)
        if mean.numel() != rstd.numel():
            raise ValueError(f"norm_pack: mean must have {rstd.numel()} elements as rstd has, found {mean.numel()}")
    return rstd.numel(), n


def norm_pack_cuda(x: Tensor, mean: Tensor | None, rstd: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes, scales = norm_pack_fake(x, mean, rstd, bits, group)
    R, padded = rstd.numel(), scales.numel() * group
    kernels = kernels_for("norm_pack", x.dtype, padded, x, mean, rstd)
    if kernels is None or padded >= R * MOST_OF_A_ROW:
        return NotImplemented
    x, rstd = x.contiguous(), rstd.contiguous()
    mean = None if mean is None else mean.contiguous()
    addresses = x.data_ptr(), address(mean), rstd.data_ptr(), codes.data_ptr(), scales.data_ptr()
    kernels.norm_pack(*where(x), R, x.numel() // R, TYPES[x.dtype], bits, group, *addresses)
    return codes, scales


norm_pack = define(norm_pack_ref, norm_pack_fake, norm_pack_cuda)
