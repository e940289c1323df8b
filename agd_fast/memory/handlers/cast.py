"""Casts: to keep the result of a cast, its original is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from agd_fast.memory.interception import Run


def cast(run: Run, call: Callable[[], Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    """input: any shape → the same values, as far as the other dtype holds them."""
    output = call()
    replaced = output is not input and run.replaces(input) and run.replaces(output)
    if replaced and output.device == input.device and output.dtype != input.dtype:
        run.provenance.record_cast(output, input)
    return output
