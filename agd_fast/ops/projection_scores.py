"""A block's projection and an adapter's scores of the same tokens, in one product: x·[Wᵀ | Aᵀ], followed by the softmax."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.absorbed_attention import scores
from agd_fast.ops.defining import define, too_many_scores


def projection_scores_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, score_bias: Tensor | None = None, heads: int = 1
) -> tuple[Tensor, Tensor]:
    """q = x·weightᵀ + bias [B, ..., N], and P = softmax(x·Aᵀ + score_bias) over each head's tokens [B, ..., S].

    x: [B, ..., C]; weight: [N, C]; bias: [N] or None; A: [B, S, C], S of all heads; score_bias: [B, 1, S] float32 or None.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("projection_scores", x=x, weight=weight, bias=bias, A=A, score_bias=score_bias)
    return F.linear(x, weight, bias), scores(x, A, score_bias, heads)


def _flops(x: Tensor, weight: Tensor, bias: object, A: Tensor, *_: object) -> int:
    return 2 * x.numel() * (len(weight) + A.shape[1])


def _limit(x: Tensor, weight: Tensor, bias: object, A: Tensor, score_bias: object = None, heads: int = 1) -> str:
    if heads != 1:
        return f"{heads} heads, more than 1"
    return too_many_scores("projection_scores", A)


projection_scores = define(projection_scores_ref, flops=_flops, limit=_limit)
