"""The paper's two adapters as its public reference code computes them (github.com/cristianpjensen/agd).

They differ from `cross_attention` and `offset` in that every block has embedders of (ω, t, c) of its own. The reference's
form also means omega_features="fourier", identity_at_one=False and one head. Its positions end at 250 tokens; here they continue.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agd_fast.adapters.base import Context, Prepared, gained, pooled, with_tokens
from agd_fast.adapters.config import AdapterConfig
from agd_fast.adapters.cross_attention import CrossAttention, rows_of
from agd_fast.adapters.offset import Offset
from agd_fast.conditioning import Conditioning
from agd_fast.sites import Layout, ResolvedSite


class ReferenceCrossAttention(CrossAttention):
    uses_tokens = False

    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        self.embedders = nn.ModuleList(Conditioning(config, layout, self.hidden) for _ in sites)

    def forward(self, context: Context) -> Prepared:
        """As in CrossAttention."""
        return tuple(
            site.entry(*rows_of(with_tokens(context, embedder, context.omega)), context.ahead)  # type: ignore[operator, arg-type]
            for site, embedder in zip(self.sites, self.embedders, strict=True)
        )


class ReferenceOffset(Offset):
    """cfg_mult [1]: what ω is multiplied by before its features are taken, 1,000 in the reference's scripts. It is not folded
    into their frequencies: at angles that large, float32 keeps few digits, and multiplying in another order changes them."""

    uses_tokens = False
    cfg_mult: Tensor

    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__(config, sites, layout)
        self.embedders = nn.ModuleList(Conditioning(config, layout, self.hidden, normed=True) for _ in sites)
        self.register_buffer("cfg_mult", torch.ones(1))

    def forward(self, context: Context) -> Prepared:
        """δ [B, C] per site."""
        omega = context.omega * self.cfg_mult
        embeddings = (pooled(with_tokens(context, embedder, omega)) for embedder in self.embedders)  # type: ignore[arg-type]
        return tuple(
            gained(site.net(embedding), context)  # type: ignore[operator]
            for site, embedding in zip(self.sites, embeddings, strict=True)
        )
