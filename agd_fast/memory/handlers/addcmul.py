"""torch.addcmul: input + value·tensor1 ⊙ tensor2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.handlers.follow import follow
from agd_fast.memory.handlers.mul import factor, product_gradient
from agd_fast.memory.interception import Run


def addcmul(run: Run, call: Callable[[], Tensor], input: Tensor, tensor1: Tensor, tensor2: Tensor, **options: Any) -> Tensor:
    """input, tensor1, tensor2: broadcast to each other."""
    if options:
        return call()
    inputs = input, tensor1, tensor2
    if input.is_complex() or not run.replaces_product(tensor1, tensor2):
        return follow(run, torch.addcmul, call(), *inputs)
    with torch.no_grad():
        output = call()
    saved = tuple(factor(run, one, output) for one in (tensor1, tensor2))
    output = run.attach("addcmul", output, partial(_backward, shape=tuple(input.shape)), saved, *inputs)
    return follow(run, torch.addcmul, output, *inputs)


def _backward(
    gradient: Tensor, needs: Any, tensor1: Tensor, tensor2: Tensor, *, shape: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    return (
        gradient.sum_to_size(shape) if needs[0] else None,
        product_gradient(gradient, tensor2, tensor1.shape) if needs[1] else None,
        product_gradient(gradient, tensor1, tensor2.shape) if needs[2] else None,
    )
