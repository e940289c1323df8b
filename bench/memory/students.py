"""What is trained: a denoiser of a public model with random weights, an adapter on it, and one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import agd_fast as agd
from agd_fast import AdapterConfig
from agd_fast.families import SPECS
from speed.architectures import Architecture, build
from speed.arms import randomise_zeros, reference_config

ADAPTERS: dict[str, tuple[str, Callable[[Architecture], AdapterConfig]]] = {
    "default": ("ours, of the backbone's kind", lambda architecture: AdapterConfig()),
    "cross_attention": ("ours, of the paper's kind", lambda architecture: AdapterConfig("cross_attention")),
    "reference": (
        "the paper's, as its code has it: embedders at every block, in the base's dtype",
        lambda architecture: reference_config(None, architecture.reference_hidden),
    ),
}


def student(architecture: Architecture, adapter: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The frozen denoiser with an adapter of a kind in ADAPTERS, none of whose weights are zero."""
    denoiser = build(architecture, device, dtype).requires_grad_(False)
    torch.manual_seed(0)
    made = agd.attach(denoiser, ADAPTERS[adapter][1](architecture))
    randomise_zeros(made)
    if adapter == "reference":
        made.to(dtype)
    return denoiser


def arguments(architecture: Architecture, batch: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call of the denoiser, by (dotted) name: random, not from a scheduler."""
    spec = SPECS[architecture.cls]
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *architecture.sample, generator=random).to(device, dtype)
    t: Tensor = architecture.timesteps(4)[1].float().expand(batch) / architecture.time_unit
    conditions = architecture.inputs(batch, device, dtype, seed=seed + 1)
    return {spec.sample: x, spec.timestep: t.to(device), **conditions, **architecture.constants(batch)}
