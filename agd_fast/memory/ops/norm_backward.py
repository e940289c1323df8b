"""The gradient of a norm's input, from its packed normalised input."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import MOST_OF_A_ROW, TYPES, address, kernels_for, where
from agd_fast.memory.ops.layout import (
    computed_in,
    dequantise,
    expand_channels,
    require_channels,
    require_float,
    require_packed,
    require_statistics,
    rows_like,
)
from agd_fast.memory.ops.registry import define


def norm_backward_ref(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    centred: bool,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    """rstd·(w − [centred]·mean(w) − x̂·mean(w·x̂)) with w = dy·γ, means over a row.

    dy: R·n elements, rows in memory order; codes, scales: as `norm_pack` gives them; rstd: R elements of float32; gamma: [C] of
    any floating dtype or None for 1; centred: False for an RMS norm. Element i of row r is in channel (r mod G)·(n/S) + ⌊i/S⌋,
    C = G·n/S: G = S = 1 for a layer norm, G groups and S = H·W for a group norm → contiguous, of dy's size and dtype.
    Raises: ValueError naming the argument that does not fit.
    """
    n = _require(dy, codes, scales, rstd, gamma, G, S, bits, group)
    dtype = computed_in(dy)
    normed = dequantise(codes, scales, n, bits, group, dtype)
    w = rows_like(dy, rstd).to(dtype)
    if gamma is not None:
        w = w * expand_channels(gamma.to(dtype)[None], rstd.numel(), n, 1, G, S)
    inner = w - normed * (w * normed).mean(1, keepdim=True)
    if centred:
        inner = inner - w.mean(1, keepdim=True)
    return (inner * rstd.reshape(-1, 1)).to(dy.dtype).view(dy.shape)


def norm_backward_fake(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    centred: bool,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    _require(dy, codes, scales, rstd, gamma, G, S, bits, group)
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _require(
    dy: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, gamma: Tensor | None, G: int, S: int, bits: int, group: int
) -> int:
    """n."""
    require_float("norm_backward", "dy", dy)
    n = require_statistics("norm_backward", "rstd", rstd, dy)
    require_packed("norm_backward", codes, scales, rstd.numel(), n, bits, group)
    C = require_channels("norm_backward", rstd.numel(), n, G, S)
    if gamma is not None:
        require_float("norm_backward", "gamma", gamma)
        if gamma.ndim != 1 or gamma.numel() != C:
            raise ValueError(f"norm_backward: gamma must be [{C}], found {list(gamma.shape)}")
    return n


def norm_backward_cuda(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    centred: bool,
    G: int,
    S: int,
    bits: int,
    group: int,
) -> Tensor:
    dx = norm_backward_fake(dy, codes, scales, rstd, gamma, centred, G, S, bits, group)
    kernels = kernels_for("norm_backward", dy.dtype, dy.numel(), dy, codes, scales, rstd, gamma)
    R = rstd.numel()
    if kernels is None or dy.numel() >= R * MOST_OF_A_ROW:
        return NotImplemented
    n = dy.numel() // R
    dy, codes, scales, rstd = dy.contiguous(), codes.contiguous(), scales.contiguous(), rstd.contiguous()
    if gamma is not None:
        gamma = gamma.contiguous() if gamma.dtype == dy.dtype else gamma.float().contiguous()
    size = kernels.norm_backward_sums(R, n)
    sums = torch.empty(size, dtype=torch.float32, device=dy.device) if size else None
    inputs = dy.data_ptr(), codes.data_ptr(), scales.data_ptr(), rstd.data_ptr(), address(gamma)
    is_float = gamma is not None and gamma.dtype == torch.float32
    outputs = address(sums), dx.data_ptr()
    kernels.norm_backward(*where(dy), R, n, TYPES[dy.dtype], bits, group, *inputs, is_float, centred, G, S, *outputs)
    return dx


norm_backward = define(norm_backward_ref, norm_backward_fake, norm_backward_cuda)
