"""Checks of numbers that callers give, made before anything is done with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from torch import Tensor

LARGEST_SEED = 2**42  # seeds that are derived from it are still valid for torch


def require_whole(lowest: int = 1, highest: int | None = None, **values: Any) -> None:
    """Raises: ValueError naming the first value that is neither None nor an int from `lowest` to `highest`."""
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (whole and lowest <= value and (highest is None or value <= highest)):
            most = "" if highest is None else f" and at most {highest:,}"
            raise ValueError(f"{name} must be an int of at least {lowest}{most}, found {value!r}")


def require_seed(value: Any) -> None:
    require_whole(0, LARGEST_SEED, seed=value)


def number_range(name: str, value: Any, *, within: tuple[float, float] | None = None) -> tuple[float, float]:
    """Raises: ValueError unless it is (low, high), a sequence of two finite numbers, low < high, both in the range `within`."""
    numbers = [*map(float, value)] if isinstance(value, Sequence) and all(isinstance(one, Real) for one in value) else []
    low, high = numbers if len(numbers) == 2 else (math.nan, math.nan)
    lowest, highest = within or (-math.inf, math.inf)
    if not (-math.inf < low < high < math.inf and lowest <= low and high <= highest):
        where = "" if within is None else f" and both from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} must be (low, high), two finite numbers with low < high{where}, found {value!r}")
    return low, high


def is_finite(tensor: Tensor) -> Tensor:
    """Element-wise isfinite; also for 8-bit floats, for which torch has none."""
    return (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()
