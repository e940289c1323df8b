"""Empty subclasses that mark a module with an adapter, so that torch.compile's type guard sees it come and go.

They are named, saved and pickled as the class that they stand for.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class _Equal(type):
    """Makes a marker equal to the class that it stands for: `from_pipe` asks whether the type of a component is in a list."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or vars(cls).get("_agd_base") is other

    def __hash__(cls) -> int:
        return hash(cls._agd_base)  # type: ignore[attr-defined]


def mark(module: nn.Module) -> None:
    if "_agd_base" not in vars(type(module)):
        module.__class__ = _marker(type(module))  # type: ignore[arg-type]


def unmark(module: nn.Module) -> None:
    base = vars(type(module)).get("_agd_base")
    if base is not None:
        module.__class__ = base


@functools.cache
def _marker(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return _Equal(cls.__name__, (cls,), {**names, "__reduce__": _reduce, "_agd_base": cls})


def _reduce(module: Any) -> tuple[Any, ...]:
    return _remake, (module._agd_base,), module.__getstate__()


def _remake(base: type[nn.Module]) -> nn.Module:
    marker = _marker(base)  # type: ignore[arg-type]
    return marker.__new__(marker)
