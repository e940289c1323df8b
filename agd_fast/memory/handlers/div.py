"""Quotients of two tensors that both need gradients, as linear attention's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.handlers.follow import follow
from agd_fast.memory.handlers.mul import factor
from agd_fast.memory.interception import Run


def div(run: Run, call: Callable[[], Tensor], input: Any, other: Any, **options: Any) -> Tensor:
    """input, other: broadcast to each other."""
    if options or not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return call()
    if not run.replaces(input) or not other.requires_grad:
        return follow(run, torch.div, call(), input, other)
    with torch.no_grad():
        output = call()
    saved = tuple(factor(run, one, output) for one in (input, other))
    return follow(run, torch.div, run.attach("div", output, _backward, saved, input, other), input, other)


def _backward(gradient: Tensor, needs: Any, input: Tensor, other: Tensor) -> tuple[Tensor | None, ...]:
    by_input = gradient / other
    return (
        by_input.sum_to_size(input.shape) if needs[0] else None,
        (-by_input * input / other).sum_to_size(other.shape) if needs[1] else None,
    )
