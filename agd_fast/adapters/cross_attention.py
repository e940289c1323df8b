"""Cross-attention: g = W_o·softmax(q·kᵀ/√d)·v + b with q = W_q·h and k, v from the tokens of (ω, t, c) (the paper's adapter)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agd_fast.adapters.base import Part, Prepared, SiteAdapter
from agd_fast.adapters.config import AdapterConfig
from agd_fast.spec import ResolvedSite


def sinusoidal_positions(length: int, width: int, device: torch.device) -> Tensor:
    """sin and cos of the position, [S, d], for any length; d must be even."""
    rates = torch.exp(-math.log(10000.0) * torch.arange(0, width, 2, device=device) / width)  # [d/2]
    angles = torch.arange(length, device=device)[:, None] * rates
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
        key, value, gain = prepared
        dtype = hidden.dtype
        query = F.linear(hidden, self.query.weight.to(dtype))  # [B, T, d]
        q, k, v = (self._split(x.to(dtype)) for x in (query, key, value))  # [B, heads, ·, d/heads]
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, T, d]
        delta = F.linear(attended, self.out.weight.to(dtype), self.out.bias.to(dtype))
        return output + (delta if gain is None else delta * gain.to(dtype)).to(output.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossAttention(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...]) -> None:
        super().__init__(config, sites)
        if self.hidden % 2:
            raise ValueError(f"cross_attention needs an even `hidden`, found {self.hidden}")
        self.sites = nn.ModuleList(CrossAttentionSite(site, self.hidden, config.heads) for site in sites)

    def forward(self, tokens: list[Tensor], gain: Tensor | None) -> Prepared:
        """(k, v, gain) a site: [B, S, d], [B, S, d], [B, 1, 1] or None."""
        sequence = torch.cat(tokens, dim=1)  # [B, S, d]
        sequence = sequence + sinusoidal_positions(sequence.shape[1], sequence.shape[2], sequence.device)
        gain = None if gain is None else gain[:, None, None]
        return tuple((site.key(sequence), site.value(sequence), gain) for site in self.sites)  # type: ignore[operator]
