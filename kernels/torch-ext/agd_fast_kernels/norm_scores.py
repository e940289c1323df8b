"""Layer norm with per-sample γ and β, and the softmax of its rows' products with a few keys while they are in registers."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, packed, per_sample, rows_of
from .ada_layer_norm import modulated, one_row, place, row_tiles
from .shapes import require

# As in ada_layer_norm, with fewer warps: each key's product is a sum across warps; a key is read once for a tile's rows.
CONFIGS: tuple[dict[str, int], ...] = (
    {"TILE": 2048, "num_warps": 2},
    {"TILE": 2048, "num_warps": 4},
    {"TILE": 4096, "num_warps": 4},
)


@triton.jit
def softmax_of_heads(found, columns, S: tl.constexpr, HEADS: tl.constexpr):
    """[ROWS, COLUMNS] → the softmax over each head's S/HEADS columns, 0 in columns from S on."""
    P = tl.zeros_like(found)
    for head in tl.static_range(HEADS):
        inside = ((columns >= head * (S // HEADS)) & (columns < (head + 1) * (S // HEADS)))[None, :]
        its = tl.where(inside, found, float("-inf"))
        powers = tl.exp(its - tl.max(its, axis=1)[:, None])
        P = tl.where(inside, powers / tl.sum(powers, axis=1)[:, None], P)
    return P


@triton.jit
def norm_scores_fwd_kernel(
    x, gamma, beta, A, score_bias, out, P,
    x_b, x_t, gamma_b, beta_b, A_b, A_s, score_bias_b, T, C, eps,
    S: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of out [B, T, C] and of P [B, T, S], of one sample; arithmetic in float32."""
    sample, tokens = place(T, ROWS)
    columns, s = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = columns < C
    mask = (tokens < T)[:, None] & inside[None, :]
    rows = tl.load(x + sample * x_b + (tokens * x_t)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    normed = modulated(rows, gamma, beta, sample * gamma_b + columns, sample * beta_b + columns, inside, C, eps)
    rounded = normed.to(out.dtype.element_ty)
    tl.store(out + ((sample * T + tokens) * C)[:, None] + columns[None, :], rounded, mask=mask)

    normed = rounded.to(tl.float32)  # the scores are of the norm as written, after rounding
    found = tl.zeros((ROWS, COLUMNS), tl.float32)
    for score in tl.static_range(S):
        key = one_row(A, sample * A_b + score * A_s + columns, inside)
        found = tl.where((s == score)[None, :], tl.sum(normed * key, axis=1)[:, None], found)
    if score_bias is not None:
        found += one_row(score_bias, sample * score_bias_b + s, s < S)
    weights = softmax_of_heads(found, s, S, HEADS).to(P.dtype.element_ty)
    tl.store(P + ((sample * T + tokens) * S)[:, None] + s[None, :], weights, mask=(tokens < T)[:, None] & (s < S)[None, :])


def norm_scores_fwd(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    A: Tensor,
    score_bias: Tensor | None = None,
    eps: float = 1e-5,
    heads: int = 1,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """n = ada_layer_norm(x) [B, ..., C], and P = softmax(n·Aᵀ + score_bias) over each head's tokens [B, ..., S].

    x: [B, ..., C]; gamma, beta: [B or 1, C] or None; A: [B, S, C], S over all heads; score_bias: [B, 1, S] float32 or None.
    Raises: ValueError naming the argument whose shape, dtype or device is another, no channels, or heads that do not divide S.
    """
    require("norm_scores", x=x, gamma=gamma, beta=beta, A=A, score_bias=score_bias)
    S = A.shape[1]
    if not x.shape[-1]:
        raise ValueError(f"norm_scores: x must have channels, found {list(x.shape)}")
    if heads < 1 or S < 1 or S % heads:
        raise ValueError(f"norm_scores: heads must divide the {S} scores, found {heads}")
    launch = chosen("norm_scores", CONFIGS, config, x.dtype)
    out, P = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], S)
    if P.numel():
        rows, A = rows_of(x), packed(A)
        gamma, beta, score_bias = (None if tensor is None else packed(tensor) for tensor in (gamma, beta, score_bias))
        grid, tiles = row_tiles(launch, *rows.shape)
        norm_scores_fwd_kernel[grid](
            rows, gamma, beta, A, score_bias, out, P,
            *rows.stride()[:2], per_sample(gamma), per_sample(beta), *A.stride()[:2], per_sample(score_bias),
            *rows.shape[1:], eps,
            S=S, HEADS=heads, COLUMNS=triton.next_power_of_2(S), **tiles,
        )  # fmt: skip
    return out, P
