"""The kinds of adapter, and how one is made for a denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from agd_fast.adapters.adapter import Adapter
from agd_fast.adapters.config import AdapterConfig
from agd_fast.sites import Layout
from agd_fast.spec import DenoiserSpec, Site

LARGEST_HIDDEN = 320  # the paper's width for UNets; wider brings little
LARGEST_RANK = 16  # of gated_lora, whose products are paid at every token of every step


def adapter_sites(kind: str, config: AdapterConfig, spec: DenoiserSpec) -> tuple[Site, ...]:
    """The spec's sites that this kind of adapter acts on, narrowed to the config's `layers`.

    Raises: ValueError when the spec names none, or a layer is not a site of any of the config's kinds.
    """
    sites = _all_sites(kind, config, spec)
    if config.layers is None:
        return sites
    known = {site.path for other in config.kinds for site in _all_sites(other, config, spec)}
    for layer in config.layers:
        if not any(fnmatchcase(layer, path) for path in known):
            raise ValueError(f"layers must be among {', '.join(map(repr, sorted(known)))}; found {layer!r}")
    narrowed = tuple(replace(site, path=layer) for site in sites for layer in config.layers if fnmatchcase(layer, site.path))
    if not narrowed:
        raise ValueError(f"layers leave a {kind!r} adapter no site; expected one among {', '.join(repr(s.path) for s in sites)}")
    return narrowed


def _all_sites(kind: str, config: AdapterConfig, spec: DenoiserSpec) -> tuple[Site, ...]:
    blocks: Sequence[str] = config.blocks or ("attention",)
    if kind == "modulation":
        blocks = ("modulation",)
    elif kind == "gated_lora" and config.blocks is None:  # beside convolutions it is cheapest: they have few sites and much work
        blocks = ("convolution",) if spec.convolution else ("attention", "feed_forward")
    sites = tuple(site for block in blocks for site in getattr(spec, block))
    if not sites:
        raise ValueError(f"a {kind!r} adapter needs {' or '.join(blocks)} sites; the spec names none")
    return sites


def for_backbone(config: AdapterConfig, spec: DenoiserSpec) -> AdapterConfig:
    """`config`, with the backbone's default kind if it names none."""
    return config if config.kind is not None else replace(config, kind=spec.adapter_kind)


class AdapterTooLargeError(ValueError):
    """No width of the adapter stays within `max_fraction` of the base."""


def build_adapter(config: AdapterConfig, layout: Layout, base_parameters: int) -> Adapter:
    """A zero adapter; `hidden=None` becomes the largest width within `max_fraction` of `base_parameters`."""
    if config.hidden is None:
        config = sized(config, _largest_hidden(config, layout, base_parameters))
    return Adapter(sized(config, config.hidden), layout)


def sized(config: AdapterConfig, hidden: int | None) -> AdapterConfig:
    """`config` with this width, and the rank that goes with it if none was chosen."""
    rank = config.rank or (min(3 * (hidden or 0), LARGEST_RANK) if "gated_lora" in config.kinds else None)
    return replace(config, hidden=hidden, rank=rank)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _largest_hidden(config: AdapterConfig, layout: Layout, base_parameters: int) -> int:
    step = config.heads * (2 if any("cross_attention" in kind for kind in config.kinds) else 1)
    budget = config.max_fraction * base_parameters

    def cost(hidden: int) -> int:
        with torch.device("meta"):
            return count_parameters(Adapter(sized(config, hidden), layout))

    low, high = 1, max(LARGEST_HIDDEN // step, 1)  # in units of `step`
    if cost(step) > budget:
        raise AdapterTooLargeError(
            f"the smallest {config.kind!r} adapter has {cost(step):,} parameters, more than "
            f"max_fraction={config.max_fraction} of the base's {base_parameters:,}; give `hidden` or a larger max_fraction"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle * step) <= budget else (low, middle - 1)
    return low * step
