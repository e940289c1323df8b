"""Weights of a model in forms that a card computes faster with: made once for all captured forwards, beside the model's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from agd_fast.ops import centre

SEVERAL = 8  # convolutions of images, a choice: transformers have two at most, to cut patches, and SDXL's UNet 40
_SWAPPING = RLock()  # who would find another's weights in a model would leave them there

Places = Callable[[Tensor], Sequence[Tensor]]  # of a copy → of it what each weight is copied to


class Copies:
    """Those that somebody reads, each of which is made once. Valid as long as a model's weights are where they were; `renew`
    takes over what was written to them since."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
        self._of: dict[Any, tuple[Places, Sequence[Tensor]]] = {}  # by key: the places in a copy, and what each is of
        self._own = WeakIdKeyDictionary()  # the model's own, by copies in its place

    def _once(
        self, key: Any, make: Callable[[], Tensor], weights: Sequence[Tensor], places: Places = lambda made: [made]
    ) -> Tensor:
        if (found := self._made.get(key)) is None:
            self._made[key] = found = make()
            self._of[key] = places, weights
        return found

    def joined(self, weights: Sequence[Tensor | int]) -> Tensor:
        """Weights and zeros of a length, one behind the other along their first dimension."""
        lengths = [one if isinstance(one, int) else len(one) for one in weights]
        there = [index for index, one in enumerate(weights) if isinstance(one, Tensor)]

        def places(made: Tensor) -> list[Tensor]:
            pieces = made.split(lengths)
            return [pieces[index] for index in there]

        key = "joined", *(one if isinstance(one, int) else ("weight", id(one)) for one in weights)
        return self._once(key, lambda: cat(weights), [weights[index] for index in there], places)  # type: ignore[misc]

    def channels_last(self, weight: Tensor) -> nn.Parameter:
        """[C_out, C_in, H, W], its channels side by side in memory; to stand in the weight's place."""

        def make() -> nn.Parameter:
            turned = weight.detach().contiguous(memory_format=torch.channels_last)
            return nn.Parameter(turned, requires_grad=False)

        found = self._once(("channels last", id(weight)), make, [weight])
        self._own[found] = weight
        return found  # type: ignore[return-value]

    def own(self, weight: Tensor) -> Tensor:
        """What stood there before."""
        return self._own.get(weight, weight)

    def twin(self, weight: Tensor, strides: Sequence[int]) -> Tensor:
        """One that lies as is said, for steps to write to what they read of it next."""
        own = self.own(weight)

        def make() -> Tensor:
            return torch.empty_strided(own.shape, strides, dtype=own.dtype, device=own.device).copy_(own.detach())

        return self._once(("twin", id(own), tuple(strides)), make, [own])

    def centre(self, weight: Tensor) -> Tensor:
        """[C, K], of a weight [C, K, ...] with odd sizes."""
        own = self.own(weight)
        return self._once(("centre", id(own)), lambda: centre(own.detach()).contiguous(), [centre(own)])

    @property
    def bytes(self) -> int:
        return sum(made.nbytes for made in self._made.values())

    def renew(self) -> None:
        """Writes through `tensor.data` leave no trace, so that nobody can tell whether there were any."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for key, made in self._made.items():
            places, weights = self._of[key]
            pairs[key[0]] += zip(places(made), weights, strict=True)
        for each in pairs.values():
            torch._foreach_copy_([place for place, _ in each], [weight for _, weight in each])


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
                module._parameters["weight"] = copies.channels_last(weight)
            yield
        finally:
            for module, weight in own:
                module._parameters["weight"] = weight  # type: ignore[assignment]


def _convolutions(denoiser: nn.Module) -> list[nn.Conv2d]:
    """Those of neighbourhoods, with plain weights that lie otherwise."""
    found = (module for module in denoiser.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
    plain = (module for module in found if type(module._parameters.get("weight")) is nn.Parameter)
    return [module for module in plain if not module.weight.is_contiguous(memory_format=torch.channels_last)]
