"""F.linear: with a trainable weight its input is kept, with a frozen one nothing but the weight."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.interception import Run, autocasts
from agd_fast.memory.provenance import HEAVIEST, again
from agd_fast.memory.saved import Kept, Source, as_is


def linear(run: Run, call: Callable[[], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input: [..., K]; weight: [C, K]; bias: [C] → [..., C]."""
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return _trainable(run, call, input, weight, bias)
    if run.replaces(input) and weight.ndim == 2 and autocasts(input):  # autograd would keep the weight's cast
        with torch.no_grad():
            output = call()
        output = run.attach("linear", output, _frozen_backward, (as_is(weight),), input)
    else:
        output = call()
    if run.mode.recomputes:
        _follow(run, output, input, weight, bias)
    return output


def _trainable(run: Run, call: Callable[[], Tensor], input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not weight.requires_grad or input.numel() < run.mode.smallest or weight.ndim != 2 or weight.is_complex():
        return call()
    with torch.no_grad():
        output = call()
    provenance = run.provenance
    saved = (provenance.save(input, run.mode.fine), provenance.save(weight, None))
    inputs = (input, weight) if bias is None else (input, weight, bias)
    output = run.attach("linear", output, _trainable_backward, saved, *inputs)
    _follow(run, output, input, weight, bias)
    return output


def _follow(run: Run, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Record that the output can be rebuilt from what gives the input back."""
    if run.mode.exact or any(one is not None and one.is_inference() for one in (input, bias)):  # which autograd refuses to keep
        return
    found = run.provenance.find(input)
    if found is not None and found.source.cost >= HEAVIEST:
        return
    linear = partial(_again, kept_weight=run.provenance.save(weight, None), bias=bias, dtype=output.dtype)
    if found is None and input.requires_grad:
        run.provenance.record_linear(output, input, linear)
    else:
        run.provenance.record(output, linear(found or input))


def _again(parent: Kept, *, kept_weight: Kept, bias: Tensor | None, dtype: torch.dtype) -> Source:
    tensors = () if bias is None else (bias,)
    return again(partial(_linear, dtype=dtype), parent, kept_weight, tensors=tensors, cost=1)


def _linear(*args: Tensor, dtype: torch.dtype) -> Tensor:
    *bias, input, weight = (one.to(dtype) for one in args)
    with torch.no_grad():
        return F.linear(input, weight, *bias)


def _frozen_backward(gradient: Tensor, needs: Any, weight: Tensor) -> tuple[Tensor]:
    return (gradient @ weight.to(gradient.dtype),)


def _trainable_backward(gradient: Tensor, needs: Any, input: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
    rows = gradient.reshape(-1, gradient.shape[-1])  # [R, C]
    found = [
        gradient @ weight.to(gradient.dtype) if needs[0] else None,
        rows.t() @ input.reshape(-1, input.shape[-1]).to(gradient.dtype) if needs[1] else None,
    ]
    if len(needs) == 3:
        found.append(rows.sum(0) if needs[2] else None)
    return tuple(found)
