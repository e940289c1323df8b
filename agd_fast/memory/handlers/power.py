"""Squares, as in RMS norms that are written out: what is kept is shared with the product that follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.interception import Run


def power(run: Run, call: Callable[[], Tensor], input: Any, exponent: Any = 2) -> Tensor:
    """input: any shape."""
    if not isinstance(exponent, (int, float)) or exponent != 2 or not run.replaces(input):
        return call()
    with torch.no_grad():
        output = call()
    return run.attach("square", output, _backward, (run.provenance.save(input, run.mode.fine),), input)


def _backward(gradient: Tensor, needs: Any, input: Tensor) -> tuple[Tensor]:
    return (2 * gradient * input,)
