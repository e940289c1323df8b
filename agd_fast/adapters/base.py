"""What every kind of adapter is made of: a part that depends on (ω, t, c) alone, and a part that meets the tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from agd_fast.adapters.config import AdapterConfig
from agd_fast.spec import ResolvedSite

Prepared = tuple[Any, ...]  # one entry a site


class SiteAdapter(nn.Module):
    """What an adapter does at one site: here, adding δ [B, C] to every token.

    Like sites differ in nothing but tensors, so that blocks which are compiled one by one share a graph.
    """

    def __init__(self, site: ResolvedSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        """The module's new output from its input and output; `prepared` is this site's entry."""
        return output + broadcast(prepared, output, self.site.channel_dim)


class Part(nn.Module):
    """One kind of adapter at all its sites, created equal to zero.

    `forward` holds all that does not see x_t: it can be computed for a whole schedule before the first step.
    `sites` hold what remains at each, in the order of the layout.
    """

    sites: nn.ModuleList

    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...]) -> None:
        super().__init__()
        assert config.hidden is not None
        self.hidden = config.hidden

    def forward(self, tokens: list[Tensor], gain: Tensor | None) -> Prepared:
        """Tokens of (ω, t, c), [B, S, d] each, and the factor (ω − 1) [B] or None → one entry a site."""
        raise NotImplementedError


def pooled(tokens: list[Tensor]) -> Tensor:
    """Σ of the tokens' means: [B, S, d] … → [B, d]."""
    means = [token.squeeze(1) if token.shape[1] == 1 else token.mean(dim=1) for token in tokens]
    return sum(means[1:], means[0])


def broadcast(delta: Tensor, output: Tensor, channel_dim: int) -> Tensor:
    """δ [B, C] in the shape and dtype that meets `output`, whose channels are at `channel_dim`."""
    shape = [1] * output.ndim
    shape[0], shape[channel_dim] = delta.shape
    return delta.view(shape).to(output.dtype)
