"""Modulation: a low-rank δ on the base's own conditioning sites, δ = B·act(E(ω, t, c)).

Where the base is modulated (adaLN), δ moves shift, scale and gate of its blocks; where it only normalises (UNets), δ
is a per-sample γ, or (γ, β), of its norms. It never sees x_t, so all of it can be computed before the first step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from agd_fast.adapters.base import Context, Part, Prepared, SiteAdapter, broadcast, gained, pooled
from agd_fast.adapters.config import AdapterConfig
from agd_fast.sites import Layout, ResolvedSite


class ScaleSite(SiteAdapter):
    """output·(1 + δ): prepared is δ, [B, C]."""

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        return torch.addcmul(output, output, broadcast(prepared, output, self.site.channel_dim))


class AffineSite(SiteAdapter):
    """output·(1 + δ_γ) + δ_β: prepared is δ_γ beside δ_β, [B, 2C]."""

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        gamma, beta = (broadcast(delta, output, self.site.channel_dim) for delta in prepared.chunk(2, dim=-1))
        return output + torch.addcmul(beta, output, gamma)


# the site of each form, and how many δ of the site's width it takes
_FORMS = {"add": (SiteAdapter, 1), "scale": (ScaleSite, 1), "affine": (AffineSite, 2)}


class Modulation(Part):
    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        self.sites = nn.ModuleList(_FORMS[site.form][0](site) for site in sites)
        self.widths = [_FORMS[site.form][1] * site.width for site in sites]
        self.up = nn.Linear(self.hidden, sum(self.widths))  # B for all sites, in one matrix
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, context: Context) -> Prepared:
        delta = self.up(F.silu(pooled(context)))  # [B, Σ widths]
        return gained(delta, context).split(self.widths, dim=-1)
