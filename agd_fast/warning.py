"""Messages to a caller: warnings at the caller's own line, however deep in here they arise, and errors on one line."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("agd_fast", "torch", "diffusers", "contextlib", "functools")


def warn(message: str) -> None:
    """A UserWarning at the innermost line that is neither in this library nor in one that it is called through."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def described(error: Exception) -> str:
    """The error's class and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"
