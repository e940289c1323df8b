"""A block's output projection, an adapter's mix and the residual, in one product: [attended | P]·[Wᵀ ; U]."""

from __future__ import annotations

import torch
from agd_fast_kernels.shapes import require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.defining import define, row, tokens, too_many_scores


def projection_mix_ref(
    attended: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor | None,
    U: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None = None,
) -> Tensor:
    """residual + gate·(attended·weightᵀ + bias + P·U).

    attended: [B, ..., K]; weight: [C, K]; bias: [C], or one a sample [B, C] (an offset adapter), or None; P: [B, ..., S] with
    U [B, S, C], or both None; residual: [B, ..., C] or None; gate: [B or 1, C] or None → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("projection_mix", attended=attended, weight=weight, bias=bias, P=P, U=U, residual=residual, gate=gate)
    if (P is None) != (U is None):
        raise ValueError(f"projection_mix: expected P and U or neither, found {'U' if P is None else 'P'} alone")
    shared = bias is None or bias.ndim == 1
    y = F.linear(attended, weight, bias if shared else None)
    if bias is not None and not shared:
        y = y + row(bias, y)
    if P is not None and U is not None:
        y = torch.baddbmm(tokens(y), tokens(P), U).view(y.shape)
    y = y if gate is None else y * row(gate, y)
    return y if residual is None else residual + y


def _flops(attended: Tensor, weight: Tensor, bias: object, P: object, U: Tensor | None, *_: object) -> int:
    tokens = attended.numel() // attended.shape[-1]
    return 2 * tokens * len(weight) * (weight.shape[1] + (0 if U is None else U.shape[1]))


def _limit(attended: Tensor, weight: Tensor, bias: object, P: object, U: Tensor | None, *_: object) -> str:
    return "" if U is None else too_many_scores("projection_mix", U)


projection_mix = define(projection_mix_ref, flops=_flops, limit=_limit)
