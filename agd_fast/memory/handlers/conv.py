"""Convolutions with frozen weights: their input gradient needs no input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.convolution import input_gradient
from agd_fast.memory.interception import Run
from agd_fast.memory.saved import as_is


def convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The handler of F.conv<n>d or F.conv_transpose<n>d."""
    transposed = "transpose" in function.__name__
    dims = int(function.__name__[-2])
    names = (
        ("stride", "padding", "output_padding", "groups", "dilation")
        if transposed
        else ("stride", "padding", "dilation", "groups")
    )

    def handler(
        run: Run, call: Callable[[], Tensor], input: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """input: [B, C, ...], or [C, ...]; weight: [C', C / groups, ...]."""
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        if not run.replaces(input, weight, bias) or input.ndim != dims + 2 or isinstance(options.get("padding"), str):
            return call()
        with torch.no_grad():
            output = call()
        spread: dict[str, Any] = {name: _spread(options.get(name, default), dims) for name, default in _DEFAULTS.items()}
        backward = partial(_backward, size=tuple(input.shape), transposed=transposed, groups=options.get("groups", 1), **spread)
        return run.attach(function.__name__, output, backward, (as_is(weight),), input)

    return handler


_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}


def _spread(value: Any, dims: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * dims if len(found) == 1 else found


def _backward(gradient: Tensor, needs: Any, weight: Tensor, **call: Any) -> tuple[Tensor]:
    return (input_gradient(gradient, weight=weight.to(gradient.dtype), **call),)
