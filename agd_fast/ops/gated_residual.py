"""A block's output added to the tokens, with its gate and the mix of an absorbed cross-attention."""

from __future__ import annotations

import torch
from agd_fast_kernels.shapes import require
from torch import Tensor

from agd_fast.ops.defining import define, row, tokens, too_many_scores


def gated_residual_ref(
    residual: Tensor, y: Tensor, gate: Tensor | None, P: Tensor | None = None, U: Tensor | None = None
) -> Tensor:
    """residual + gate·(y + P·U).

    residual, y: [B, ..., C]; gate: [B or 1, C], or None for 1; P: [B, ..., S] with U [B, S, C], or both None → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("gated_residual", residual=residual, y=y, gate=gate, P=P, U=U)
    if (P is None) != (U is None):
        raise ValueError(f"gated_residual: expected P and U or neither, found {'U' if P is None else 'P'} alone")
    if P is not None and U is not None:
        y = torch.baddbmm(tokens(y), tokens(P), U).view(y.shape)
    return residual + y if gate is None else torch.addcmul(residual, y, row(gate, y))


def _flops(residual: Tensor, y: Tensor, gate: object, P: Tensor | None = None, U: Tensor | None = None) -> int:
    return 0 if U is None else 2 * y.numel() * U.shape[1]


def _limit(residual: Tensor, y: Tensor, gate: object, P: Tensor | None = None, U: Tensor | None = None) -> str:
    return "" if U is None else too_many_scores("gated_residual", U)


gated_residual = define(gated_residual_ref, flops=_flops, limit=_limit)
