"""Weights of a model in forms that a card computes faster with: made once for all captured forwards, beside the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

SEVERAL = 8  # convolutions of images: fewer are not what a model spends its time in
_SWAPPING = RLock()  # who would find another's weights in a model would leave them there


class Copies:
    """Valid as long as a model's weights are where they were; `renew` takes over what was written to them since."""

    def __init__(self) -> None:
        self._made: dict[Any, Tensor] = {}
        self._joined: list[tuple[Tensor, Tensor]] = []  # each copy, and what it is of
        self._turned: list[tuple[Tensor, Tensor]] = []

    def joined(self, weights: Sequence[Tensor | int]) -> Tensor:
        """Weights and zeros of a length, one behind the other along their first dimension."""
        key = "joined", *(one if isinstance(one, int) else ("weight", id(one)) for one in weights)
        if key not in self._made:
            self._made[key] = made = cat(weights)
            places = made.split([one if isinstance(one, int) else len(one) for one in weights])
            self._joined += [(place, one) for place, one in zip(places, weights, strict=True) if isinstance(one, Tensor)]
        return self._made[key]

    def channels_last(self, weight: Tensor) -> Tensor:
        """[C_out, C_in, H, W], its channels side by side in memory."""
        key = "channels last", id(weight)
        if key not in self._made:
            self._made[key] = made = weight.detach().contiguous(memory_format=torch.channels_last)
            self._turned.append((made, weight))
        return self._made[key]

    @property
    def bytes(self) -> int:
        return sum(made.nbytes for made in self._made.values())

    def renew(self) -> None:
        """Writes through `tensor.data` leave no trace, so that nobody can tell whether there were any."""
        for pairs in (self._joined, self._turned):
            if pairs:
                torch._foreach_copy_([place for place, _ in pairs], [weight for _, weight in pairs])


def cat(weights: Sequence[Tensor | int], into: Tensor | None = None) -> Tensor:
    """Joined along their first dimension, `like.new_zeros(n)` for a number n."""
    like = next(one for one in weights if isinstance(one, Tensor))
    return torch.cat([like.new_zeros(one) if isinstance(one, int) else one for one in weights], out=into)


def prefers_channels_last(denoiser: nn.Module) -> bool:
    """Whether it is a model of images [B, C, H, W] as UNets are, on CUDA: libraries convolve these with channels side by side,
    and turn weights that lie otherwise round at every step."""
    found = _convolutions(denoiser)
    return len(found) >= SEVERAL and all(module.groups == 1 and module.weight.device.type == "cuda" for module in found)


@contextmanager
def in_channels_last(denoiser: nn.Module, copies: Copies) -> Iterator[None]:
    """Inside, the denoiser's convolutions have such weights, and so give such images."""
    with _SWAPPING:
        own = [(module, module.weight) for module in _convolutions(denoiser)]
        try:
            for module, weight in own:
                module._parameters["weight"] = nn.Parameter(copies.channels_last(weight), requires_grad=False)
            yield
        finally:
            for module, weight in own:
                module._parameters["weight"] = weight  # type: ignore[assignment]


def _convolutions(denoiser: nn.Module) -> list[nn.Conv2d]:
    """Those of neighbourhoods, with plain weights that lie otherwise."""
    found = (module for module in denoiser.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
    plain = (module for module in found if type(module._parameters.get("weight")) is nn.Parameter)
    return [module for module in plain if not module.weight.is_contiguous(memory_format=torch.channels_last)]
