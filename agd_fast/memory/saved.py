"""How backward gets a tensor back: what is kept of it, and how it is rebuilt from that."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)


class Layout(NamedTuple):
    """Where in its storage a tensor lies."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Layouts = tuple[Layout, Layout]  # of a whole value, and of a view in the same storage


@dataclass(eq=False)
class Source:
    """One value that backward can rebuild. Not to be modified.

    tensors: what is kept of it. rebuild: (*tensors, *values of parents) → the value; it holds no tensor itself.
    fine: whether it is precise enough for the gradient of a weight, or to compute with. cost: matrix products on the way to it.
    depth: functions on the way to it. roots: the copies that it is made from. norms: those of them that are x̂, by the norm's
    number in the forward. reads: the tensors that it is made from and that belong to others.
    """

    tensors: tuple[Tensor, ...]
    rebuild: Callable[..., Tensor]
    parents: tuple[Kept, ...] = ()
    fine: bool = True
    cost: int = 0
    depth: int = 0
    roots: frozenset[int] = frozenset()
    norms: frozenset[int] = frozenset()
    reads: frozenset[Read] = frozenset()

    @property
    def holds(self) -> bool:
        """Whether it still gives back what it did: nobody has written to what it reads."""
        return not any(one.changed for one in self.reads)


@dataclass(eq=False)
class Read:
    """A tensor that belongs to others, and its version when it was read."""

    tensor: Tensor
    version: int

    @property
    def changed(self) -> bool:
        return self.tensor._version != self.version


def read(tensors: Iterable[Tensor]) -> frozenset[Read]:
    return frozenset([Read(tensor, tensor._version) for tensor in tensors])


@dataclass(eq=False)
class Saved:
    """A source's value, or a view of it. layouts: how both lay in memory in the forward. Not to be modified."""

    source: Source
    layouts: Layouts | None = None


Kept: TypeAlias = "Saved | Tensor"  # a tensor is kept as it is


def new_root() -> frozenset[int]:
    return frozenset({next(_ROOTS)})


_ROOTS = itertools.count()

_Place = tuple[int, Any]  # number of a step, and layouts; or ~number of a tensor, and None


class _Step(NamedTuple):
    """start, end: where its own tensors are in the list."""

    rebuild: Callable[..., Tensor]
    start: int
    end: int
    parents: tuple[_Place, ...]


class Program(NamedTuple):
    """Rebuilds several values from one list of tensors, each source once."""

    steps: tuple[_Step, ...]
    wanted: tuple[_Place, ...]

    def values(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        found: list[Tensor] = []
        for rebuild, start, end, parents in self.steps:
            found.append(rebuild(*tensors[start:end], *[_value(place, found, tensors) for place in parents]))
        return [_value(place, found, tensors) for place in self.wanted]


def _value(place: _Place, found: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    number, layouts = place
    if number < 0:
        return tensors[~number]
    return found[number] if layouts is None else _view(found[number], layouts)


class _Compiler:
    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.tensors: list[Tensor] = []
        self.numbers: dict[Source, int] = {}

    def add(self, kept: Kept) -> _Place:
        if not isinstance(kept, Saved):
            self.tensors.append(kept)
            return -len(self.tensors), None
        source = kept.source
        number = self.numbers.get(source)
        if number is None:
            parents = tuple([self.add(parent) for parent in source.parents])
            start = len(self.tensors)
            self.tensors.extend(source.tensors)
            number = self.numbers[source] = len(self.steps)
            self.steps.append(_Step(source.rebuild, start, len(self.tensors), parents))
        return number, kept.layouts


def compiled(kept: tuple[Kept, ...]) -> tuple[Program | None, Sequence[Tensor]]:
    """The program that gives all of these back, or None if they are plain tensors; and the tensors to keep for it."""
    if not any(isinstance(one, Saved) for one in kept):
        return None, kept  # type: ignore[return-value]
    compiler = _Compiler()
    wanted = tuple([compiler.add(one) for one in kept])
    return Program(tuple(compiler.steps), wanted), compiler.tensors


def as_is(tensor: Tensor) -> Tensor:
    """The tensor without its history. A subclass, such as a packed weight, is left alone: it knows how it is kept."""
    return tensor.detach() if tensor.requires_grad and type(tensor) in PLAIN else tensor


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each place once."""
    return tensor.is_contiguous() or fills(layout_of(tensor))


def fills(layout: Layout) -> bool:
    """Whether elements in this layout fill one piece of memory, each place once."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(layout.size, layout.stride, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def holds(whole: Layout, part: Layout) -> bool:
    """Whether the view `part` lies within the piece of memory that the dense tensor `whole` fills."""
    count = torch.Size(whole.size).numel()
    last = sum((size - 1) * stride for size, stride in zip(part.size, part.stride, strict=True))
    return 0 not in part.size and whole.offset <= part.offset and part.offset + last < whole.offset + count


def _view(value: Tensor, layouts: Layouts) -> Tensor:
    whole, part = layouts
    if value.stride() != whole.stride or value.shape != whole.size:
        value = torch.empty_strided(whole.size, whole.stride, dtype=value.dtype, device=value.device).copy_(
            value.view(whole.size)
        )
    return value.as_strided(part.size, part.stride, part.offset - whole.offset + value.storage_offset())
