"""What every kind of adapter is made of: a part that depends on (ω, t, c) alone, and a part that meets the tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.adapters.config import AdapterConfig
from agd_fast.conditioning import Conditioning
from agd_fast.sites import Layout, ResolvedSite

Prepared = tuple[Any, ...]  # one entry per site


@dataclass(frozen=True)
class Ahead:
    """How entries are made before the first step: what does not change with t is kept apart from what does.

    dtype: of the tokens that they will meet. absorb: whether entries take in projections if that saves products at each token.
    """

    dtype: torch.dtype
    absorb: bool = True


@dataclass(frozen=True)
class Context:
    """What a part may see: (ω, t, c), never x_t.

    omega: ω [B]. time: e_t [B, D_t]. conditions: e_c [B, D_c] or [B, L, D_c] by argument.
    masks: [B, L] bool by argument, True at the tokens that count; without one, all tokens of an argument count.
    gain: a factor on all that the adapter contributes [B], such as (ω − 1); None if there is none.
    ahead: how entries are made before the first step; None if they are made in the step.
    tokens: the adapter's own embeddings of these, [B, S, d] each; token_masks: [B, S] bool or None for each.
    """

    omega: Tensor
    time: Tensor
    conditions: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    gain: Tensor | None = None
    ahead: Ahead | None = None
    tokens: tuple[Tensor, ...] = ()
    token_masks: tuple[Tensor | None, ...] = ()


def with_tokens(context: Context, conditioning: Conditioning, omega: Tensor) -> Context:
    """`context` with the tokens that `conditioning` makes of it and of this ω [B]."""
    tokens = tuple(conditioning(omega, context.time, context.conditions))
    return replace(context, tokens=tokens, token_masks=conditioning.token_masks(context.masks))


class SiteAdapter(nn.Module):
    """What an adapter does at one site: here, adding δ [B, C] to every token.

    Similar sites differ only in tensors, so that blocks that are compiled one by one share a graph.
    """

    def __init__(self, site: ResolvedSite) -> None:
        super().__init__()
        self.site = site

    def forward(self, hidden: Tensor, output: Tensor, prepared: Any) -> Tensor:
        """The module's new output from its input and output; `prepared` is this site's entry."""
        return output + broadcast(prepared, output, self.site.channel_dim)


class Part(nn.Module):
    """One kind of adapter at all its sites, initialized to zero.

    `forward` does all that does not see x_t: it can be computed for a whole schedule before the first step.
    `sites` do what remains at each site, in the order of the layout.
    uses_tokens: whether it reads the tokens that all parts share; False for a part with embedders of its own.
    """

    sites: nn.ModuleList
    uses_tokens = True

    def __init__(self, config: AdapterConfig, sites: tuple[ResolvedSite, ...], layout: Layout) -> None:
        super().__init__()
        assert config.hidden is not None
        self.hidden = config.hidden

    def forward(self, context: Context) -> Prepared:
        """One entry per site."""
        raise NotImplementedError


def pooled(context: Context) -> Tensor:
    """Σ over embeddings of the mean of the tokens that count: [B, S, d] … → [B, d]."""
    means = [_mean(token, mask) for token, mask in zip(context.tokens, context.token_masks, strict=True)]
    return sum(means[1:], means[0])


def _mean(token: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:  # the mean of none is zero
        return token.masked_fill(~mask[..., None], 0).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return token.squeeze(1) if token.shape[1] == 1 else token.mean(dim=1)


def gained(delta: Tensor, context: Context) -> Tensor:
    """δ [B, C] times the context's gain, if there is one; in the dtype of the tokens if made ahead."""
    delta = delta if context.gain is None else delta * context.gain[:, None]
    return delta if context.ahead is None else delta.to(context.ahead.dtype)


def broadcast(delta: Tensor, output: Tensor, channel_dim: int) -> Tensor:
    """δ [B, C] in the dtype of `output`, and in a shape that broadcasts to it; `channel_dim`: where its channels are."""
    shape = [1] * output.ndim
    shape[0], shape[channel_dim] = delta.shape
    return delta.view(shape).to(output.dtype)
