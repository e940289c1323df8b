"""Gated low-rank terms: g = U·(s(ω, t, c) ⊙ D·h), a LoRA beside a block whose r directions are scaled per sample.

Of all kinds this one sees every token through a map of its own; only the gates s can be computed before the first step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from agd_fast import ops
from agd_fast.adapters.base import Context, Part, Prepared, SiteAdapter, gained, pooled
from agd_fast.adapters.config import AdapterConfig
from agd_fast.sites import Layout, ResolvedSite


class ScaledUp(NamedTuple):
    """U·diag(s) of one sample, [C, r]: made before the first step, it saves the scaling in each step."""

    weight: Tensor


class GatedLoraSite(SiteAdapter):
    """Costs two thin products per token: h [B, T, C_in] → [B, T, r] → [B, T, C], or the same over [B, C, H, W]."""

    def __init__(self, site: ResolvedSite, rank: int) -> None:
        super().__init__(site)
        self.down = nn.Linear(site.input_width, rank, bias=False)
        self.up = nn.Linear(rank, site.width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        up, gates = (prepared.weight, None) if isinstance(prepared, ScaledUp) else (self.up.weight, prepared)
        dtype = hidden.dtype
        up, gates = up.to(dtype), None if gates is None else gates.to(dtype)
        first = self.site.channel_dim == 1
        return ops.gated_lora(hidden, output.to(dtype), self.down.weight.to(dtype), up, gates, first).to(output.dtype)


class GatedLora(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        assert config.rank is not None
        self.rank = config.rank
        self.sites = nn.ModuleList(GatedLoraSite(site, config.rank) for site in sites)
        self.gates = nn.Linear(self.hidden, config.rank * len(sites))  # for all sites, in one matrix

    def forward(self, context: Context) -> Prepared:
        """s [B, r] per site, or ScaledUp."""
        gates = gained(1 + self.gates(F.silu(pooled(context))), context).split(self.rank, dim=-1)  # [B, r·sites]
        if context.ahead is None or len(context.omega) > 1:
            return gates
        return tuple(ScaledUp(site.up.weight * gate) for site, gate in zip(self.sites, gates, strict=True))  # type: ignore
