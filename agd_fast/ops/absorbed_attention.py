"""Cross-attention to few tokens, its projections put into its keys and values: the engine's form of cross-attention adapters."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.ops.defining import define_composite, tokens


def scores(x: Tensor, A: Tensor, score_bias: Tensor | None, heads: int) -> Tensor:
    """softmax(x·Aᵀ + score_bias) over each head's tokens, in x's dtype; scores are never rounded to fewer bits than float32.

    x: [B, ..., C]; A: [B, S, C], S of all heads; score_bias: [B, 1, S] float32 or None → [B, ..., S].
    """
    flat, keys = tokens(x), A.to(x.dtype).transpose(1, 2)  # [B, T, C], [B, C, S]
    if x.dtype in (torch.float32, torch.float64):
        found = torch.bmm(flat, keys) if score_bias is None else torch.baddbmm(score_bias.to(x.dtype), flat, keys)
    else:
        found = torch.bmm(flat.float(), keys.float()) if x.is_cpu else torch.bmm(flat, keys, out_dtype=torch.float32)
        found = found if score_bias is None else found + score_bias
    P = found.unflatten(-1, (heads, found.shape[-1] // heads)).softmax(dim=-1)
    return P.to(x.dtype).reshape(*x.shape[:-1], found.shape[-1])


def absorbed_attention_ref(
    hidden: Tensor, output: Tensor, A: Tensor, U: Tensor, score_bias: Tensor | None = None, heads: int = 1
) -> Tensor:
    """output + softmax(x·Aᵀ + score_bias)·U over each head's tokens.

    hidden: x [B, ..., K]; output: [B, ..., C]; A: [B, S, K]; U: [B, S, C], S of all heads; score_bias: [B, 1, S] float32.
    """
    P = tokens(scores(hidden, A, score_bias, heads))
    return torch.baddbmm(tokens(output), P.to(output.dtype), U.to(output.dtype)).view_as(output)


absorbed_attention = define_composite(absorbed_attention_ref)
