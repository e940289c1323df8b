"""A projection and an adapter's scores for its tokens in one product: one more column of tiles, with A as weight."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import IN_FLOAT32, chosen, packed, product, rows_of, tile_of
from .shapes import MAX_SCORES, require

MOST = MAX_SCORES["projection_scores"]  # one tile: the softmax is over all of it
CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 2},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4},
)


@triton.jit
def projection_scores_fwd_kernel(
    x, weight, bias, A, score_bias, q, P,
    x_b, x_t, weight_n, A_b, A_s, score_bias_b,
    T, N, C, S, tiles_m, tiles_t, tiles_n, tiles_q,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of q [B, T, N], or, in the column after the tiles_q ones, of P [B, T, S]; its tokens are of one sample."""
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    sample = (m // tiles_t).to(tl.int64)
    first, tokens = m % tiles_t * BLOCK_M, tl.arange(0, BLOCK_M)
    x += sample * x_b + first.to(tl.int64) * x_t
    x_rows = tl.minimum(tokens, T - 1 - first) * x_t
    written = (tokens < T - first)[:, None]
    if n == tiles_q:
        s = tl.arange(0, BLOCK_S)
        scores = product(x, x_rows, A + sample * A_b, tl.minimum(s, S - 1) * A_s, C, BLOCK_M, BLOCK_S, BLOCK_K)
        if score_bias is not None:
            scores += tl.load(score_bias + sample * score_bias_b + s, mask=s < S, other=0.0)[None, :]
        scores = tl.where((s < S)[None, :], scores, float("-inf"))
        weights = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        weights = weights / tl.sum(weights, axis=1)[:, None]
        P += (sample * T + first) * S
        tl.store(P + (tokens * S)[:, None] + s[None, :], weights.to(P.dtype.element_ty), mask=written & (s < S)[None, :])
    else:
        left, columns = n * BLOCK_N, tl.arange(0, BLOCK_N)
        weight += left.to(tl.int64) * weight_n
        acc = product(x, x_rows, weight, tl.minimum(columns, N - 1 - left) * weight_n, C, BLOCK_M, BLOCK_N, BLOCK_K)
        if bias is not None:
            acc += tl.load(bias + left + columns, mask=columns < N - left, other=0.0).to(tl.float32)[None, :]
        q += (sample * T + first) * N + left
        inside = written & (columns < N - left)[None, :]
        tl.store(q + (tokens * N)[:, None] + columns[None, :], acc.to(q.dtype.element_ty), mask=inside)


def projection_scores_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    score_bias: Tensor | None = None,
    heads: int = 1,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """q = x·weightᵀ + bias [B, ..., N], and P = softmax(x·Aᵀ + score_bias) [B, ..., S].

    x: [B, ..., C]; weight: [N, C]; bias: [N] or None; A: [B, S, C], S ≤ 128; score_bias: [B, 1, S] float32 or None.
    Raises: ValueError naming the argument whose shape, dtype or device is another; for more than one head or 128 scores.
    """
    require("projection_scores", x=x, weight=weight, bias=bias, A=A, score_bias=score_bias)
    if heads != 1:
        raise ValueError(f"projection_scores: heads must be 1, found {heads}")
    (N, C), S = weight.shape, A.shape[1]
    if S > MOST:
        raise ValueError(f"projection_scores: A must have at most {MOST} scores a token, found {S}")
    launch = chosen("projection_scores", CONFIGS, config, x.dtype, **IN_FLOAT32)
    q, P = x.new_empty(*x.shape[:-1], N), x.new_empty(*x.shape[:-1], S)
    rows, weight, A = rows_of(x), packed(weight), packed(A)
    bias = None if bias is None else bias.contiguous()
    score_bias = None if score_bias is None else packed(score_bias)
    B, T = rows.shape[:2]
    tiles_t = triton.cdiv(T, launch["BLOCK_M"])
    tiles_q = triton.cdiv(N, launch["BLOCK_N"])
    tiles_n = tiles_q + (S > 0)
    if B * T * tiles_n:
        projection_scores_fwd_kernel[(B * tiles_t * tiles_n,)](
            rows, weight, bias, A, score_bias, q, P,
            rows.stride(0), rows.stride(1), weight.stride(0), A.stride(0), A.stride(1),
            0 if score_bias is None else score_bias.stride(0),
            T, N, C, S, B * tiles_t, tiles_t, tiles_n, tiles_q,
            BLOCK_S=max(16, triton.next_power_of_2(S)), **launch,
        )  # fmt: skip
    return q, P
