"""How a tensor is given back in backward: what is kept of it, and what makes it again from that."""

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
    """One value of backward. Not to be changed.

    tensors: what is kept of it. rebuild: (*tensors, *values of parents) → the value; it holds no tensor itself.
    fine: whether it is precise enough for the gradient of a weight, or to compute with. cost: products of matrices on the way to
    it. depth: functions on the way to it. roots: the copies that it is made from. norms: those of them that are x̂, by the norm's
    number in the forward. reads: the tensors of others that it is made from.
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
    """A tensor of somebody else, and its version when it was read."""

    tensor: Tensor
    version: int

    @property
    def changed(self) -> bool:
        return self.tensor._version != self.version


def read(tensors: Iterable[Tensor]) -> frozenset[Read]:
    return frozenset([Read(tensor, tensor._version) for tensor in tensors])


@dataclass(eq=False)
class Saved:
    """A source's value, or a view of it, by how both lay in forward. Not to be changed."""

    source: Source
    layouts: Layouts | None = None


Kept: TypeAlias = "Saved | Tensor"  # a tensor is kept as it is


def new_root() -> frozenset[int]:
    return frozenset({next(_ROOTS)})


_ROOTS = itertools.count()

_Place = tuple[int, Any]  # the number of a step, and layouts; or ~ the number of a tensor


class _Step(NamedTuple):
    """start, end: of its own tensors."""

    rebuild: Callable[..., Tensor]
    start: int
    end: int
    parents: tuple[_Place, ...]


class Program(NamedTuple):
    """Makes several values from one list of tensors, each source once."""

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
    """What gives all of these back, and the tensors to keep for it; None where the tensors are what is wanted."""
    if not any(isinstance(one, Saved) for one in kept):
        return None, kept  # type: ignore[return-value]
    compiler = _Compiler()
    wanted = tuple([compiler.add(one) for one in kept])
    return Program(tuple(compiler.steps), wanted), compiler.tensors


def as_is(tensor: Tensor) -> Tensor:
    """Without its history. What is no plain tensor, as a packed weight, knows itself how it is kept."""
    return tensor.detach() if tensor.requires_grad and type(tensor) in PLAIN else tensor


def layout_of(tensor: Tensor) -> Layout:
    return Layout(tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one piece of memory, each once."""
    return tensor.is_contiguous() or fills(layout_of(tensor))


def fills(layout: Layout) -> bool:
    """Whether what lies so fills one piece of memory, each element once."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(layout.size, layout.stride, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def holds(whole: Layout, part: Layout) -> bool:
    """Whether a view lies in the piece of memory that a dense tensor fills."""
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
