"""The kinds of adapter, and how one is made for a denoiser."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from agd_fast.adapters.base import Adapter
from agd_fast.adapters.config import AdapterConfig
from agd_fast.adapters.cross_attention import CrossAttentionAdapter
from agd_fast.adapters.modulation import ModulationAdapter
from agd_fast.adapters.offset import OffsetAdapter
from agd_fast.spec import DenoiserSpec, Layout, Site

KINDS: dict[str, type[Adapter]] = {
    "modulation": ModulationAdapter,
    "cross_attention": CrossAttentionAdapter,
    "offset": OffsetAdapter,
}
LARGEST_HIDDEN = 320  # the paper's width for UNets; wider brings little


def adapter_sites(config: AdapterConfig, spec: DenoiserSpec) -> tuple[Site, ...]:
    """The spec's sites that this kind of adapter acts on.

    Raises: ValueError when the spec names none.
    """
    if config.kind == "modulation":
        sites, where = spec.modulation, "modulation"
    else:
        where = " or ".join(config.blocks)
        sites = tuple(site for block in config.blocks for site in getattr(spec, block))
    if not sites:
        raise ValueError(f"a {config.kind!r} adapter needs {where} sites; the spec names none")
    return sites


def build_adapter(config: AdapterConfig, layout: Layout, base_parameters: int) -> Adapter:
    """A zero adapter; `hidden=None` becomes the largest width within `max_fraction` of `base_parameters`."""
    if config.hidden is None:
        config = replace(config, hidden=_largest_hidden(config, layout, base_parameters))
    return KINDS[config.kind](config, layout)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _largest_hidden(config: AdapterConfig, layout: Layout, base_parameters: int) -> int:
    step = config.heads * (2 if config.kind == "cross_attention" else 1)
    budget = config.max_fraction * base_parameters

    def cost(hidden: int) -> int:
        with torch.device("meta"):
            return count_parameters(KINDS[config.kind](replace(config, hidden=hidden), layout))

    low, high = 1, max(LARGEST_HIDDEN // step, 1)  # in units of `step`
    if cost(step) > budget:
        raise ValueError(
            f"the smallest {config.kind!r} adapter has {cost(step):,} parameters, more than "
            f"max_fraction={config.max_fraction} of the base's {base_parameters:,}; give `hidden` or a larger max_fraction"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle * step) <= budget else (low, middle - 1)
    return low * step
