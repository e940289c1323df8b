"""Weights of a model in forms that a card computes faster with: made once for all captured forwards, beside the model's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

SEVERAL = 8  # convolutions of images: fewer are not what a model spends its time in


class Copies:
    """Valid as long as the model's weights are what they were."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Tensor, list[Any]]] = {}  # and what each is made of, so that no id is taken by something else

    def joined(self, pieces: Sequence[Tensor | int]) -> Tensor:
        """Weights and zeros of a length, one behind the other along their first dimension."""
        return self._of(("joined",), pieces, lambda: _cat(pieces))

    def channels_last(self, weight: Tensor) -> Tensor:
        """[C_out, C_in, H, W], its channels side by side in memory."""
        return self._of(("channels last",), [weight], lambda: weight.detach().contiguous(memory_format=torch.channels_last))

    @property
    def bytes(self) -> int:
        return sum(made.nbytes for made, _ in self._made.values())

    def _of(self, kind: tuple[str], pieces: Sequence[Tensor | int], make: Callable[[], Tensor]) -> Tensor:
        key = (*kind, *(piece if isinstance(piece, int) else ("tensor", id(piece)) for piece in pieces))
        if key not in self._made:
            self._made[key] = make(), [*pieces]
        return self._made[key][0]


def prefers_channels_last(denoiser: nn.Module) -> bool:
    """Whether it is a model of images [B, C, H, W] as UNets are, on CUDA: libraries convolve these with channels side by side,
    and turn weights that lie otherwise round at every step."""
    found = _convolutions(denoiser)
    return len(found) >= SEVERAL and all(module.groups == 1 and module.weight.device.type == "cuda" for module in found)


@contextmanager
def in_channels_last(denoiser: nn.Module, copies: Copies) -> Iterator[None]:
    """Inside, the denoiser's convolutions have such weights, and so give such images."""
    own = [(module, module._parameters["weight"]) for module in _convolutions(denoiser)]
    try:
        for module, weight in own:
            assert weight is not None
            module._parameters["weight"] = nn.Parameter(copies.channels_last(weight), requires_grad=False)
        yield
    finally:
        for module, weight in own:
            module._parameters["weight"] = weight


def contiguous(output: Tensor) -> Tensor:
    """An image as the model itself gives it, for those that ask how it lies."""
    lies_otherwise = output.ndim == 4 and output.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous() if lies_otherwise else output


def _convolutions(denoiser: nn.Module) -> list[nn.Conv2d]:
    """Those of neighbourhoods, with plain weights."""
    found = (module for module in denoiser.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1))
    return [module for module in found if type(module._parameters.get("weight")) is nn.Parameter]


def _cat(pieces: Sequence[Tensor | int]) -> Tensor:
    like = next(piece for piece in pieces if isinstance(piece, Tensor))
    return torch.cat([like.new_zeros(piece) if isinstance(piece, int) else piece for piece in pieces])
