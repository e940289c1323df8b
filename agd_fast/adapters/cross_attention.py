"""Cross-attention: g = W_o·softmax(q·kᵀ/√d)·v + b with q = W_q·h and k, v from the tokens of (ω, t, c) (the paper's adapter)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agd_fast.adapters.base import Context, Part, Prepared, SiteAdapter
from agd_fast.adapters.config import AdapterConfig
from agd_fast.spec import Layout, ResolvedSite


def sinusoidal_positions(positions: Tensor, width: int) -> Tensor:
    """sin and cos of the positions, [..., S] → [..., S, d]; d must be even."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=positions.device) / width)  # [d/2]
    angles = positions[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


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
        key, value, gain, mask = prepared
        dtype = hidden.dtype
        query = F.linear(hidden, self.query.weight.to(dtype))  # [B, T, d]
        q, k, v = (self._split(x.to(dtype)) for x in (query, key, value))  # [B, heads, ·, d/heads]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # [B, T, d]
        delta = F.linear(attended, self.out.weight.to(dtype), self.out.bias.to(dtype))
        return output + (delta if gain is None else delta * gain.to(dtype)).to(output.dtype)

    def attended(self, row: Tensor, gain: Tensor | None, mask: Tensor | None) -> Prepared:
        """This site's entry from the tokens in a row, [B, S, d]."""
        return self.key(row), self.value(row), gain, mask

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        if self.hidden % 2:
            raise ValueError(f"cross_attention needs an even `hidden`, found {self.hidden}")
        self.sites = nn.ModuleList(CrossAttentionSite(site, self.hidden, config.heads) for site in sites)

    def forward(self, context: Context) -> Prepared:
        """(k, v, gain, mask) a site: [B, S, d], [B, S, d], [B, 1, 1] or None, [B, 1, 1, S] bool or None."""
        rows = row_of(context)
        return tuple(site.attended(*rows) for site in self.sites)  # type: ignore[operator]


def row_of(context: Context) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tokens in a row, with their positions among those that count; gain and mask in the shapes that meet them."""
    row, mask = torch.cat(context.tokens, dim=1), _joined_mask(context)  # [B, S, d]
    positions = torch.arange(row.shape[1], device=row.device) if mask is None else mask.cumsum(dim=1) - 1
    row = row + sinusoidal_positions(positions, row.shape[2])
    gain = None if context.gain is None else context.gain[:, None, None]
    return row, gain, None if mask is None else mask[:, None, None]


def _joined_mask(context: Context) -> Tensor | None:
    """[B, S] bool, True at the tokens that count; None where all do."""
    if all(mask is None for mask in context.token_masks):
        return None
    masks = [
        torch.ones(token.shape[:2], dtype=torch.bool, device=token.device) if mask is None else mask
        for token, mask in zip(context.tokens, context.token_masks, strict=True)
    ]
    return torch.cat(masks, dim=1)
