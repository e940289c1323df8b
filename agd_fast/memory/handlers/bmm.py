"""Batched products of two matrices that both need gradients: in attention that is written out, in adapters on channels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.interception import Run
from agd_fast.memory.saved import Kept, as_is


def matmul(run: Run, call: Callable[[], Tensor], input: Tensor, other: Any = None, **options: Any) -> Tensor:
    """input: [..., N, K]; other: [..., K, M] → [..., N, M], batches broadcast."""
    if options or other is None or not _replaced(run, input, other):
        return call()
    with torch.no_grad():
        output = call()
    saved = _kept(run, input, -1), _kept(run, other, -2)
    return run.attach("matmul", output, _backward, saved, input, other)


def baddbmm(run: Run, call: Callable[[], Tensor], input: Tensor, batch1: Tensor, batch2: Tensor, **options: Any) -> Tensor:
    """input: broadcast to [B, N, M]; batch1: [B, N, K]; batch2: [B, K, M] → input + batch1·batch2."""
    if options or not _replaced(run, batch1, batch2):
        return call()
    with torch.no_grad():
        output = call()
    saved = _kept(run, batch1, -1), _kept(run, batch2, -2)
    backward = partial(_added_backward, shape=tuple(input.shape))
    return run.attach("baddbmm", output, backward, saved, input, batch1, batch2)


def _replaced(run: Run, one: Tensor, other: Tensor) -> bool:
    return one.ndim >= 2 and other.ndim >= 2 and run.replaces_product(one, other)


def _kept(run: Run, one: Tensor, summed: int) -> Kept:
    """summed: the dimension that the product sums over. Weights that are expanded over a batch are kept as they are."""
    if one.numel() > one.untyped_storage().nbytes() // one.element_size() or one.numel() < run.mode.smallest:
        return run.provenance.fine(one) or as_is(one)
    return run.provenance.save(one, run.mode.fine, channels=(*range(one.ndim - 2), summed))


def _backward(gradient: Tensor, needs: Any, input: Tensor, other: Tensor) -> tuple[Tensor | None, ...]:
    input, other = input.to(gradient.dtype), other.to(gradient.dtype)
    return (
        (gradient @ other.mT).sum_to_size(input.shape) if needs[0] else None,
        (input.mT @ gradient).sum_to_size(other.shape) if needs[1] else None,
    )


def _added_backward(
    gradient: Tensor, needs: Any, batch1: Tensor, batch2: Tensor, *, shape: tuple[int, ...]
) -> tuple[Tensor | None, ...]:
    return (gradient.sum_to_size(shape) if needs[0] else None, *_backward(gradient, needs[1:], batch1, batch2))
