"""Cross-attention: g = W_o·softmax(q·kᵀ/√d)·v + b with q = W_q·h and k, v from the tokens of (ω, t, c) (the paper's adapter)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agd_fast import ops
from agd_fast.adapters.base import Ahead, Context, Part, Prepared, SiteAdapter
from agd_fast.adapters.config import AdapterConfig
from agd_fast.sites import Layout, ResolvedSite


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """sin and cos of the positions, [..., S] → [..., S, d]; d must be even."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=positions.device) / width)  # [d/2]
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Attended(NamedTuple):
    """keys, values: [B, S, d], for queries W_q·h. gain: [B, 1, 1] or None. mask: [B, 1, 1, S] bool or None."""

    keys: Tensor
    values: Tensor
    gain: Tensor | None
    mask: Tensor | None


class Absorbed(NamedTuple):
    """A: [B, heads·S, C_in] and U: [B, heads·S, C], with the site's projections multiplied in. bias: [B, 1, heads·S], −inf at
    tokens that do not count; None if all do."""

    A: Tensor
    U: Tensor
    bias: Tensor | None


class CrossAttentionSite(SiteAdapter):
    def __init__(self, site: ResolvedSite, hidden: int, heads: int) -> None:
        super().__init__(site)
        self.heads = heads
        self.query = nn.Linear(site.input_width, hidden, bias=False)
        self.key = nn.Linear(hidden, hidden, bias=False)
        self.value = nn.Linear(hidden, hidden, bias=False)
        self.out = nn.Linear(hidden, site.width)
        for linear in (self.query, self.key, self.value):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        if isinstance(prepared, Absorbed):
            return ops.absorbed_attention(hidden, output, *prepared, heads=self.heads)
        key, value, gain, mask = prepared
        dtype = hidden.dtype
        query = F.linear(hidden, self.query.weight.to(dtype))  # [B, T, d]
        q, k, v = (self._split(x.to(dtype)) for x in (query, key, value))  # [B, heads, ·, d/heads]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # [B, T, d]
        delta = F.linear(attended, self.out.weight.to(dtype), self.out.bias.to(dtype)).to(output.dtype)
        return output + delta if gain is None else torch.addcmul(output, delta, gain.to(output.dtype))

    def entry(self, rows: list[Tensor], gain: Tensor | None, mask: Tensor | None, ahead: Ahead | None) -> Attended | Absorbed:
        """What this site needs of the tokens `rows`, [B, S_i, d] each."""
        if ahead is None:
            rows = [torch.cat(rows, dim=1)]
        elif ahead.absorb and self.heads * sum(row.shape[1] for row in rows) < self.key.out_features:
            return self._absorbed(rows, gain, mask, ahead.dtype)  # fewer products at every token
        keys, values = ([linear(row) for row in rows] for linear in (self.key, self.value))
        if ahead is not None:
            keys, values = ([row.to(ahead.dtype) for row in pieces] for pieces in (keys, values))
        return Attended(_joined(keys), _joined(values), gain, None if mask is None else mask[:, None, None])

    def _absorbed(self, rows: list[Tensor], gain: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Absorbed:
        """A = s·K·W_q and U = V·W_oᵀ + b: the rows of softmax sum to one for each head, so U can hold the bias."""
        width = self.key.out_features // self.heads
        W_q = self.query.weight.unflatten(0, (self.heads, width)) / math.sqrt(width)  # [heads, d/heads, C_in]
        W_o = self.out.weight.unflatten(1, (self.heads, width)).permute(1, 2, 0)  # [heads, d/heads, C]
        A, U = [], []
        for row in rows:
            A.append(torch.matmul(self._split(self.key(row)), W_q).to(dtype))  # [B, heads, S_i, C_in]
            u = torch.matmul(self._split(self.value(row)), W_o) + self.out.bias / self.heads
            U.append((u if gain is None else u * gain[:, None]).to(dtype))
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)[:, None]
            bias = bias.repeat(1, 1, self.heads)
        return Absorbed(_joined(A, 2).flatten(1, 2), _joined(U, 2).flatten(1, 2), bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        if self.hidden % 2:
            raise ValueError(f"cross_attention needs an even `hidden`, found {self.hidden}")
        if first := [site.path for site in sites if site.channel_dim != -1]:
            raise ValueError(f"cross_attention meets tokens; expected blocks whose channels come last, found {first[0]!r}")
        self.sites = nn.ModuleList(CrossAttentionSite(site, self.hidden, config.heads) for site in sites)

    def forward(self, context: Context) -> Prepared:
        """Attended or Absorbed, per site."""
        rows = rows_of(context)
        return tuple(site.entry(*rows, context.ahead) for site in self.sites)  # type: ignore[operator]


def rows_of(context: Context) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """The tokens [B, S_i, d] plus their positions among those that count, the gain [B, 1, 1] and the mask of all [B, S]."""
    tokens, mask = context.tokens, _joined_mask(context)
    sizes = [token.shape[1] for token in tokens]
    positions = torch.arange(sum(sizes), device=tokens[0].device) if mask is None else mask.cumsum(dim=1) - 1
    embedded = sinusoidal_positions(positions, tokens[0].shape[2]).to(tokens[0].dtype).split(sizes, dim=-2)
    rows = [token + position for token, position in zip(tokens, embedded, strict=True)]
    return rows, None if context.gain is None else context.gain[:, None, None], mask


def _joined(pieces: list[Tensor], dim: int = 1) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)


def _joined_mask(context: Context) -> Tensor | None:
    """[B, S] bool, True at the tokens that count; None if all do."""
    if all(mask is None for mask in context.token_masks):
        return None
    masks = [
        torch.ones(token.shape[:2], dtype=torch.bool, device=token.device) if mask is None else mask
        for token, mask in zip(context.tokens, context.token_masks, strict=True)
    ]
    return torch.cat(masks, dim=1)
