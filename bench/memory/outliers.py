"""Adds channels of large values, which trained transformers have and small or random ones lack; the function stays the same."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import Tensor, nn

SHARE, FACTOR = 0.01, 100.0


@torch.no_grad()
def inject_outliers(denoiser: nn.Module, share: float = SHARE, factor: float = FACTOR, seed: int = 0) -> int:
    """Multiply a share of channels, at least one per place, by `factor`, and divide the weights that read them by it.

    Places: norms with an affine before linears, values of attention, queries against keys, the linear half of a GEGLU. Returns
    the number of places.
    """
    random = torch.Generator().manual_seed(seed)
    places = 0
    for module in denoiser.modules():
        for makers, readers in _places(module):
            width = len(makers[0])
            count = max(1, round(share * width))
            channels = torch.randperm(width, generator=random)[:count]
            for tensor in makers:
                tensor[channels] *= factor
            for tensor, dim in readers:
                tensor.index_copy_(dim, channels, tensor.index_select(dim, channels) / factor)
            places += 1
    return places


def _places(module: Any) -> list[tuple[list[Tensor], list[tuple[Tensor, int]]]]:
    """The tensors that make the channels, along dimension 0, and those that read them, each with the dimension."""
    found: list[tuple[list[Tensor], list[tuple[Any, int]]]] = []
    if isinstance(getattr(module, "to_v", None), nn.Linear) and isinstance(module.to_out, (nn.ModuleList, nn.Sequential)):
        found.append((_rows(module.to_v), [(module.to_out[0].weight, 1)]))
        if module.to_q.out_features == module.to_k.out_features:
            found.append((_rows(module.to_q), [(tensor, 0) for tensor in _rows(module.to_k)]))
    if isinstance(module, FeedForward) and isinstance(module.net[0], GEGLU):
        half = module.net[0].proj.out_features // 2
        found.append(([tensor[:half] for tensor in _rows(module.net[0].proj)], [(module.net[2].weight, 1)]))
    if isinstance(module, BasicTransformerBlock):
        for norm, readers in _norms(module):
            if getattr(norm, "weight", None) is not None:
                found.append((_rows(norm), [(linear.weight, 1) for linear in readers]))
    return found


def _norms(block: Any) -> list[tuple[Any, list[Any]]]:
    """Each norm with the linears that follow it."""
    attention, cross = block.attn1, [] if block.attn2 is None else [(block.norm2, [block.attn2.to_q])]
    return [(block.norm1, [attention.to_q, attention.to_k, attention.to_v]), *cross, (block.norm3, [block.ff.net[0].proj])]


def _rows(module: Any) -> list[Tensor]:
    return [tensor for tensor in (module.weight, module.bias) if tensor is not None]
