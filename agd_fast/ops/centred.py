"""A convolution's weight with a low-rank term added to its centre, which has the same effect as the term beside it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agd_fast.ops.defining import define_composite


def centre(weight: Tensor) -> Tensor:
    """The centre [C, K] of a weight [C, K, …] with odd kernel sizes, as a view."""
    place: tuple[Any, ...] = (..., *(size // 2 for size in weight.shape[2:]))
    return weight[place]


def centred_ref(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """weight, with up·down added at the centre.

    weight: [C, K, …]; up: [C, r]; down: [r, K] → like weight.
    """
    found = weight.clone()
    centre(found).addmm_(up, down)
    return found


define_composite(centred_ref)  # the rewriting of graphs adds calls of it
