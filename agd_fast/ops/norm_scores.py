"""A layer norm that also gives the scores of its tokens with a few keys, for an absorbed cross-attention."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor

from agd_fast.ops.absorbed_attention import scores
from agd_fast.ops.ada_layer_norm import ada_layer_norm_ref
from agd_fast.ops.defining import define, too_many_scores


def norm_scores_ref(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    A: Tensor,
    score_bias: Tensor | None = None,
    eps: float = 1e-5,
    heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """n = ada_layer_norm(x) [B, ..., C], and P = softmax(n·Aᵀ + score_bias) over each head's tokens [B, ..., S].

    x: [B, ..., C]; gamma, beta: [B or 1, C] or None; A: [B, S, C], S of all heads; score_bias: [B, 1, S] float32 or None.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("norm_scores", x=x, gamma=gamma, beta=beta, A=A, score_bias=score_bias)
    normed = ada_layer_norm_ref(x, gamma, beta, eps)
    return normed, scores(normed, A, score_bias, heads)


def _flops(x: Tensor, gamma: object, beta: object, A: Tensor, *_: object) -> int:
    return 2 * x.numel() * A.shape[1]


def _limit(x: Tensor, gamma: object, beta: object, A: Tensor, *_: object) -> str:
    return too_many_scores("norm_scores", A)


norm_scores = define(norm_scores_ref, flops=_flops, limit=_limit)
