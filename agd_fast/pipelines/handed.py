"""Which part of its denoiser's output a pipeline hands to its scheduler, in which order and with which sign.

Image-to-video pipelines leave out the frame that they were given, editing pipelines the tokens of the picture to edit; others
unpack tokens or flip the sign. The pipeline itself is asked: if the elements of its denoiser's output are numbered, which numbers
reach the scheduler, and where? Any guidance rule passes them on, as the conditional and unconditional predictions are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PART = "output.part"  # among the constants of a call: which part of its output the prediction is


@dataclass(frozen=True)
class Handed:
    """What is handed on of outputs of one shape. shape: that of a sample. part: (start, stop) in each of its dimensions. order:
    [n], for each element, in the order in which the scheduler is handed them, its index in the flattened part. sign: ±1.
    """

    shape: tuple[int, ...]
    part: tuple[tuple[int, int], ...]
    order: Tensor
    sign: int

    def is_leading(self, channels: int | None) -> bool:
        """Whether the part is the output's first channels, or with None all of it."""
        return self.part == ((0, channels or self.shape[0]), *((0, size) for size in self.shape[1:]))

    def prediction(self, handed: Tensor) -> Tensor:
        """What the scheduler is handed, [B, ...] or [B·F, ...], as that part of the denoiser's output [B, *sizes of the part]."""
        found = torch.empty_like(flat := self.sign * handed.reshape(-1, len(self.order)))
        found[:, self.order.to(flat.device)] = flat
        return found.unflatten(1, [stop - start for start, stop in self.part])

    def handed(self, prediction: Tensor, like: Tensor) -> Tensor:
        """The inverse of `prediction`, in the shape and dtype of `like`."""
        flat = self.sign * prediction.flatten(1)
        return flat[:, self.order.to(flat.device)].to(like.dtype).reshape(like.shape)


def shape_of(output: Any) -> tuple[int, ...]:
    """The shape of one sample of a denoiser's output, in whatever form that comes."""
    if isinstance(output, Mapping):  # an output class of diffusers
        return shape_of(next(iter(output.values())))
    return shape_of(output[0]) if isinstance(output, tuple) else tuple(output[0].shape)


def numbered(output: Any) -> Any:
    """A denoiser's output with 1, 2, … in place of the elements of every sample."""
    if isinstance(output, Mapping):
        first, *_ = output
        return type(output)(**{**output, first: numbered(output[first])})
    if isinstance(output, tuple):
        return (numbered(output[0]), *output[1:])
    shape, device = tuple(output[0].shape), output[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    one = torch.arange(1, math.prod(shape) + 1, device=device, dtype=wide).reshape(shape)
    return [one] * len(output) if isinstance(output, list) else one.expand(len(output), *shape)


def find_handed(found: Tensor, shape: tuple[int, ...]) -> Handed | None:
    """From what one sample's numbers have become; None if that is not a part of them, in any order and with either sign."""
    values = found.detach().double().flatten().cpu()
    sign = -1 if values[0] < 0 else 1
    numbers = (sign * values).round()
    count = math.prod(shape)
    exact = bool(((sign * values - numbers).abs() < (1e-5 * numbers).clamp(max=0.25)).all())  # guidance rules round
    if not exact or len(numbers.unique()) != len(numbers) or numbers.min() < 1 or numbers.max() > count:
        return None
    places = torch.stack(torch.unravel_index(numbers.long() - 1, shape))  # [dims, n]
    starts, stops = places.amin(dim=1), places.amax(dim=1) + 1
    sizes = (stops - starts).tolist()
    if math.prod(sizes) != len(numbers):
        return None
    order = torch.zeros_like(places[0])
    for place, start, size in zip(places, starts, sizes, strict=True):
        order = order * size + place - start
    part = tuple(zip(starts.tolist(), stops.tolist(), strict=True))
    return Handed(shape, part, order, sign)
