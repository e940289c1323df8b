"""Copies of a model's weights in forms that a GPU computes faster with, made once and shared by all captured forwards."""

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

SEVERAL = 8  # image convolutions; a chosen threshold: transformers have at most two, to cut patches, and SDXL's UNet 40
_SWAPPING = RLock()  # a second thread would take the first one's copies for the model's own weights, and leave them there

Places = Callable[[Tensor], Sequence[Tensor]]  # a copy → the parts of it that the weights are copied to


class Copies:
    """The copies in use, each made once. They are valid as long as the model's weights stay where they are; `renew` takes over
    what was written to them since."""

    def __init__(self) -> None:
        self._made: WeakValueDictionary[Any, Tensor] = WeakValueDictionary()
        self._of: dict[Any, tuple[Places, Sequence[Tensor]]] = {}  # by key: the places in a copy, and the weight for each
        self._own = WeakIdKeyDictionary()  # the model's own weights, by the copies in their place

    def _once(
        self, key: Any, make: Callable[[], Tensor], weights: Sequence[Tensor], places: Places = lambda made: [made]
    ) -> Tensor:
        if (found := self._made.get(key)) is None:
            self._made[key] = found = make()
            self._of[key] = places, weights
        return found

    def joined(self, weights: Sequence[Tensor | int]) -> Tensor:
        """Weights concatenated along their first dimension; a number n stands for n zeros."""
        lengths = [one if isinstance(one, int) else len(one) for one in weights]
        there = [index for index, one in enumerate(weights) if isinstance(one, Tensor)]

        def places(made: Tensor) -> list[Tensor]:
            pieces = made.split(lengths)
            return [pieces[index] for index in there]

        key = "joined", *(one if isinstance(one, int) else ("weight", id(one)) for one in weights)
        return self._once(key, lambda: cat(weights), [weights[index] for index in there], places)  # type: ignore[misc]

    def channels_last(self, weight: Tensor) -> nn.Parameter:
        """The weight [C_out, C_in, H, W] in channels-last layout, to stand in its place."""

        def make() -> nn.Parameter:
            turned = weight.detach().contiguous(memory_format=torch.channels_last)
            return nn.Parameter(turned, requires_grad=False)

        found = self._once(("channels last", id(weight)), make, [weight])
        self._own[found] = weight
        return found  # type: ignore[return-value]

    def own(self, weight: Tensor) -> Tensor:
        """The model's own weight, if this is a copy in its place; else the weight itself."""
        return self._own.get(weight, weight)

    def twin(self, weight: Tensor, strides: Sequence[int]) -> Tensor:
        """A copy with these strides, which each step writes to before it reads it."""
        own = self.own(weight)

        def make() -> Tensor:
            return torch.empty_strided(own.shape, strides, dtype=own.dtype, device=own.device).copy_(own.detach())

        return self._once(("twin", id(own), tuple(strides)), make, [own])

    def centre(self, weight: Tensor) -> Tensor:
        """A copy of the centre [C, K] of a weight [C, K, ...] with odd kernel sizes."""
        own = self.own(weight)
        return self._once(("centre", id(own)), lambda: centre(own.detach()).contiguous(), [centre(own)])

    @property
    def bytes(self) -> int:
        return sum(made.nbytes for made in self._made.values())

    def renew(self) -> None:
        """Copy all weights again: writes through `tensor.data` leave no trace, so nobody can tell whether there were any."""
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for key, made in self._made.items():
            places, weights = self._of[key]
            pairs[key[0]] += zip(places(made), weights, strict=True)
        for each in pairs.values():
            torch._foreach_copy_([place for place, _ in each], [weight for _, weight in each])


def cat(weights: Sequence[Tensor | int], into: Tensor | None = None) -> Tensor:
    """Weights concatenated along their first dimension; a number n stands for `like.new_zeros(n)`."""
    like = next(one for one in weights if isinstance(one, Tensor))
    return torch.cat([like.new_zeros(one) if isinstance(one, int) else one for one in weights], out=into)


def prefers_channels_last(denoiser: nn.Module) -> bool:
    """Whether it is a model on CUDA that convolves images [B, C, H, W], such as a UNet: libraries do so in channels-last layout,
    and convert weights in another layout at every step."""
    found = _convolutions(denoiser)
    return len(found) >= SEVERAL and all(module.groups == 1 and module.weight.device.type == "cuda" for module in found)


@contextmanager
def in_channels_last(denoiser: nn.Module, copies: Copies) -> Iterator[None]:
    """Inside this context, the denoiser's convolutions have channels-last weights, and so return channels-last images."""
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
    """The convolutions with kernels other than 1×1 and plain weights that are not in channels-last layout."""
    found = (module for module in denoiser.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
    plain = (module for module in found if type(module._parameters.get("weight")) is nn.Parameter)
    return [module for module in plain if not module.weight.is_contiguous(memory_format=torch.channels_last)]
