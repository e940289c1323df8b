"""How a tensor is given back in backward: what is kept of it, and what makes it again from that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


class Layout(NamedTuple):
    """Where in its storage a tensor lies."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Layouts = tuple[Layout, Layout]  # of a whole value, and of a view in the same storage


@dataclass(frozen=True, eq=False)
class Source:
    """One value of backward.

    tensors: what is kept of it. rebuild: (*tensors, *values of parents) → the value; it holds no tensor itself.
    fine: whether it is precise enough for the gradient of a weight, or to compute with. cost: products of matrices on the way to
    it. depth: functions on the way to it. roots: the copies that it is made from. norms: those of them that are x̂, by the norm's
    number in the forward.
    """

    tensors: tuple[Tensor, ...]
    rebuild: Callable[..., Tensor]
    parents: tuple[Saved, ...] = ()
    fine: bool = True
    cost: int = 0
    depth: int = 0
    roots: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()


@dataclass(frozen=True, eq=False)
class Saved:
    """A source's value, or a view of it, by how both lay in forward."""

    source: Source
    layouts: Layouts | None = None


def new_root() -> frozenset[int]:
    return frozenset({next(_ROOTS)})


_ROOTS = itertools.count()


class _Step(NamedTuple):
    rebuild: Callable[..., Tensor]
    tensors: int
    parents: tuple[tuple[int, Any], ...]  # which step, and its layouts


@dataclass(frozen=True)
class Program:
    """Makes several values from one list of tensors, each source once."""

    steps: tuple[_Step, ...]
    wanted: tuple[tuple[int, Any], ...]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        start = 0
        for step in self.steps:
            own = tensors[start : start + step.tensors]
            start += step.tensors
            found.append(step.rebuild(*own, *(_view(found[index], layouts) for index, layouts in step.parents)))
        return [_view(found[index], layouts) for index, layouts in self.wanted]


@dataclass
class _Compiler:
    steps: list[_Step] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    numbers: dict[Source, int] = field(default_factory=dict)

    def add(self, saved: Saved) -> tuple[int, Any]:
        source = saved.source
        if source not in self.numbers:
            parents = tuple(self.add(parent) for parent in source.parents)
            self.steps.append(_Step(source.rebuild, len(source.tensors), parents))
            self.tensors.extend(source.tensors)
            self.numbers[source] = len(self.steps) - 1
        return self.numbers[source], saved.layouts


def compiled(saved: Iterable[Saved]) -> tuple[Program, list[Tensor]]:
    """What gives all of these back, and the tensors to keep for it."""
    compiler = _Compiler()
    wanted = tuple(compiler.add(one) for one in saved)
    return Program(tuple(compiler.steps), wanted), compiler.tensors


def as_is(tensor: Tensor) -> Saved:
    return Saved(Source((without_history(tensor),), _same))


def without_history(tensor: Tensor) -> Tensor:
    """What is no plain tensor, as a packed weight, knows itself how it is kept."""
    return tensor.detach() if type(tensor) in PLAIN else tensor


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def holds(whole: Layout, part: Layout) -> bool:
    """Whether a view lies in the piece of memory that a dense tensor fills."""
    count = torch.Size(whole.size).numel()
    last = sum((size - 1) * stride for size, stride in zip(part.size, part.stride, strict=True))
    return 0 not in part.size and whole.offset <= part.offset and part.offset + last < whole.offset + count


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _view(value: Tensor, layouts: tuple[Layout, Layout] | None) -> Tensor:
    if layouts is None:
        return value
    whole, part = layouts
    if value.stride() != whole.stride or value.shape != whole.size:
        value = torch.empty_strided(whole.size, whole.stride, dtype=value.dtype, device=value.device).copy_(
            value.view(whole.size)
        )
    return value.as_strided(part.size, part.stride, part.offset - whole.offset + value.storage_offset())
