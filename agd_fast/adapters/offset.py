"""Offset: g = MLP(E_ω(ω) + P_t·e_t + P_c·e_c), one vector per sample, added to every token (the paper's additive adapter)."""

from __future__ import annotations

from torch import nn

from agd_fast.adapters.base import Context, Part, Prepared, SiteAdapter, gained, pooled
from agd_fast.adapters.config import AdapterConfig
from agd_fast.sites import Layout, ResolvedSite


class OffsetSite(SiteAdapter):
    def __init__(self, site: ResolvedSite, hidden: int) -> None:
        super().__init__(site)
        out = nn.Linear(hidden, site.width)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.net = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.LayerNorm(hidden), out)


class Offset(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        self.sites = nn.ModuleList(OffsetSite(site, self.hidden) for site in sites)

    def forward(self, context: Context) -> Prepared:
        embedding = pooled(context)  # [B, d]
        return tuple(gained(site.net(embedding), context) for site in self.sites)  # type: ignore[operator]
