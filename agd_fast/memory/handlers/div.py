"""Quotients of two tensors that both need gradients, as in linear attention.

The divisor is never rounded: near 0 the error would have no bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.handlers.follow import follow
from agd_fast.memory.handlers.mul import factor
from agd_fast.memory.interception import Run
from agd_fast.memory.saved import as_is


def div(run: Run, call: Callable[[], Tensor], input: Any, other: Any, **options: Any) -> Tensor:
    """input, other: broadcast to each other."""
    if options or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return call()
    if run.replaces(input) and other.requires_grad and not other.is_complex():
        with torch.no_grad():
            output = call()
        output = run.attach("div", output, _backward, (factor(run, input, output), as_is(other)), input, other)
    else:
        output = call()
    return follow(run, torch.div, output, input, other) if other.numel() < output.numel() else output


def _backward(gradient: Tensor, needs: Any, input: Tensor, other: Tensor) -> tuple[Tensor | None, ...]:
    by_input = gradient / other
    return (
        by_input.sum_to_size(input.shape) if needs[0] else None,
        (-by_input * input / other).sum_to_size(other.shape) if needs[1] else None,
    )
