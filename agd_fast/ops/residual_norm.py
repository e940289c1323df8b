"""A block's output added to the tokens, and the norm of the sum with which the next block begins, in one pass."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor

from agd_fast.ops.ada_layer_norm import ada_layer_norm_ref
from agd_fast.ops.defining import define
from agd_fast.ops.gated_residual import gated_residual_ref


def residual_norm_ref(
    residual: Tensor, y: Tensor, gate: Tensor | None, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """h = residual + gate·y, and ada_layer_norm(h), [B, ..., C] both.

    residual, y: [B, ..., C]; gate, gamma, beta: [B or 1, C], or None for 1, 1 and 0.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("residual_norm", residual=residual, y=y, gate=gate, gamma=gamma, beta=beta)
    h = gated_residual_ref(residual, y, gate)
    return h, ada_layer_norm_ref(h, gamma, beta, eps)


residual_norm = define(residual_norm_ref)
