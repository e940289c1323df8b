"""Tensors that are made empty and written to piece by piece, as some rotary embeddings are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.interception import Run
from agd_fast.memory.provenance import again
from agd_fast.memory.saved import Source


def empty_like(run: Run, call: Callable[[], Tensor], input: Tensor, **options: Any) -> Tensor:
    """What the result contains does not matter until it is written to, so any memory gives it back."""
    output = call()
    if type(input) is Tensor and output.numel() >= run.mode.smallest:
        rebuild = partial(_empty, size=tuple(output.shape), stride=output.stride(), dtype=output.dtype, device=output.device)
        run.provenance.record(output, Source((), rebuild), blank=True)
    return output


def write(run: Run, call: Callable[[], None], input: Tensor, index: Any, value: Any) -> None:
    """input[index] = value."""
    places = index if isinstance(index, tuple) else (index,)
    followed = isinstance(value, Tensor) and all(isinstance(place, (int, slice, type(...), type(None))) for place in places)
    target = run.provenance.find(input, blank=True) if followed else None
    piece = run.provenance.find(value) if followed else None
    call()
    if target is not None and piece is not None and target.source.roots <= piece.source.roots:
        run.provenance.record(input, again(partial(_write, index=index), target, piece))


def _empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=device)


def _write(target: Tensor, piece: Tensor, index: Any) -> Tensor:
    written = target.clone()
    written[index] = piece
    return written
