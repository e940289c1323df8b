"""Adapters of several kinds on a backbone, and what attaching may touch of it."""

import pytest
import torch

import agd_fast as agd

CONFIGS = [
    agd.AdapterConfig("modulation", 4),
    agd.AdapterConfig("offset", 4, blocks=("attention", "feed_forward")),
    agd.AdapterConfig("cross_attention", 4),
    agd.AdapterConfig("cross_attention", 4, blocks=("feed_forward",), omega_features="fourier", identity_at_one=False),
    agd.AdapterConfig("gated_lora+cross_attention", 4, blocks=("attention",)),  # both at the attention blocks
]
config_ids = ["modulation", "offset-both", "cross_attention", "cross_attention-ff-paper", "two-parts"]
TWO_PARTS = CONFIGS[-1]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=config_ids)


def attach(backbone, config=CONFIGS[0]):
    return agd.attach(backbone.denoiser, config, spec=backbone.spec)


@torch.no_grad()
def guided(backbone, inputs, scale=3.0):
    with agd.guided(backbone.denoiser, scale):
        return backbone(**inputs)


def trace(denoiser):
    """All that attaching may touch: classes, attributes and hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_buffers", "_parameters", "_modules")
    return {
        name: (type(module), sorted(vars(module)), [list(vars(module)[hook].items()) for hook in hooks])
        for name, module in denoiser.named_modules()
    }
