"""What is known of activations during a forward: what backward can rebuild them from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from agd_fast.memory import ops
from agd_fast.memory.modes import Mode, Packing
from agd_fast.memory.saved import (
    PLAIN,
    Kept,
    Layout,
    Layouts,
    Read,
    Saved,
    Source,
    as_is,
    fills,
    holds,
    is_dense,
    layout_of,
    new_root,
    read,
)

HEAVIEST = 2  # most matrix products on the way to a rebuilt value
DEEPEST = 32  # most functions on the way to it


@dataclass(eq=False)
class _Entry:
    """source: gives back what lay at `layout` at that version. original: the tensor it is a cast of or, with `linear`, a linear
    of; what gives that back is what the source is made of. blank: whether nothing is known to have been written to it."""

    version: int
    layout: Layout
    dtype: torch.dtype
    source: Source | None = None
    original: Read | None = None
    linear: Callable[[Kept], Source] | None = None
    blank: bool = False

    @property
    def unchanged(self) -> Tensor | None:
        """The original, if nobody has written to it since."""
        read = self.original
        return None if read is None or read.changed else read.tensor

    def made_of(self, parent: Kept) -> Source:
        return self.linear(parent) if self.linear else again(partial(_cast, dtype=self.dtype), parent)


class Activation(NamedTuple):
    """An element-wise function by name, its input, and its number in the forward."""

    name: str
    input: Tensor
    number: int


class _Activated(NamedTuple):
    """versions: of the output and of the input, when the activation ran."""

    activation: Activation
    output: ref[Tensor]
    layout: Layout
    versions: tuple[int, int]


@dataclass
class Plan:
    """fine: numbers of the norms whose x̂ is wanted in the fine form, as the previous forward found; None before the first: all.

    gated: numbers of the activations that went into a product. asked, found_gated: what this forward finds for both.
    """

    fine: frozenset[int] | None = None
    gated: frozenset[int] = frozenset()
    asked: set[int] = field(default_factory=set)
    found_gated: set[int] = field(default_factory=set)

    def again(self) -> Plan:
        """The plan for another run of the same forward."""
        return Plan(self.fine, self.gated)

    def following(self) -> Plan:
        """The plan for the next forward."""
        return Plan(frozenset(self.asked), frozenset(self.found_gated))

    def wants_fine(self, norm: int) -> bool:
        return self.fine is None or norm in self.fine


class Provenance:
    """Tables from storages, held by weak references, to what is known of them.

    unread: tells whether what is kept now is recomputed before it is read, so that only its shapes matter; None: it never is.
    """

    def __init__(self, mode: Mode, plan: Plan, unread: Callable[[], bool] | None = None) -> None:
        self.mode, self.plan, self._is_unread = mode, plan, unread
        self._entries: WeakKeyDictionary[torch.UntypedStorage, list[_Entry]] = WeakKeyDictionary()
        self._activations: WeakKeyDictionary[torch.UntypedStorage, _Activated] = WeakKeyDictionary()

    @property
    def unread(self) -> bool:
        return self._is_unread is not None and self._is_unread()

    def record(self, tensor: Tensor, source: Source, blank: bool = False) -> None:
        """Record that `source` gives `tensor` back; with `blank`, only as the target of a write that is recorded too."""
        if type(tensor) in PLAIN and tensor.is_complex():
            tensor, source = torch.view_as_real(tensor), again(torch.view_as_real, Saved(source))
        self._add(tensor, source=source, blank=blank)

    def record_cast(self, tensor: Tensor, original: Tensor) -> None:
        """Record that `tensor` is `original` in another dtype."""
        self._add(tensor, original=Read(original, original._version))

    def record_linear(self, output: Tensor, input: Tensor, linear: Callable[[Kept], Source]) -> None:
        """Record that `linear` of a copy of `input` gives `output` back; the copy is made only when it is wanted."""
        self._add(output, original=Read(input, input._version), linear=linear)

    def record_activation(self, output: Tensor, activation: Activation) -> None:
        versions = output._version, activation.input._version
        self._activations[output.untyped_storage()] = _Activated(activation, ref(output), layout_of(output), versions)

    def activation_of(self, output: Tensor) -> Activation | None:
        """The activation that gave `output`, this very tensor, if neither it nor the input has changed since and no hook or
        `retain_grad` waits for its gradient; else None."""
        found = self._activations.get(output.untyped_storage())
        if found is None or found.output() is not output or found.layout != layout_of(output):
            return None
        if output._backward_hooks or output.retains_grad:
            return None
        return found.activation if found.versions == (output._version, found.activation.input._version) else None

    def find(self, tensor: Tensor, blank: bool = False) -> Saved | None:
        """The finest and cheapest source that gives `tensor` back without keeping anything more, or None. blank: also find one
        for a tensor that is about to be written to for the first time."""
        if type(tensor) not in PLAIN or tensor.untyped_storage() not in self._entries:
            return None
        if tensor.is_complex():
            real = None if tensor.is_conj() else self.find(torch.view_as_real(tensor))
            return None if real is None else Saved(again(torch.view_as_complex, real))
        best: Saved | None = None
        for entry, layouts in self._known(tensor):
            if entry.source is None and (original := entry.unchanged) is not None:
                parent = self.find(original)
                if parent is not None:
                    entry.source = entry.made_of(parent)
            if entry.blank and not blank:
                continue
            if entry.source is not None and entry.source.holds and (best is None or _order(entry.source) < _order(best.source)):
                best = Saved(entry.source, layouts)
        return best

    def fine(self, tensor: Tensor, heaviest: int = HEAVIEST) -> Saved | None:
        """As `find`, but only in the fine form; the norms that it comes from are asked for that in the next forward."""
        found = self.find(tensor)
        if found is None or found.source.cost > heaviest:
            return None
        self.plan.asked |= found.source.norms
        return found if found.source.fine else None

    def save(self, tensor: Tensor, bits: int | None, *, heaviest: int = HEAVIEST, channels: tuple[int, ...] = (-1,)) -> Kept:
        """What gives `tensor` back: what is known of it, or a copy in `bits` bits (None: the tensor itself).

        A request for 8 bits is never met by fewer. channels: the dimensions along which magnitudes may differ much.
        """
        if type(tensor) not in PLAIN:
            return tensor
        found = self.find(tensor)
        if found is None:
            for entry, layouts in self._known(tensor):
                if (original := entry.unchanged) is not None and original.numel() <= tensor.numel():
                    entry.source = entry.made_of(self.save(original, bits, heaviest=heaviest))
                    return Saved(entry.source, layouts)
        elif found.source.cost <= heaviest:
            coarse = bits is not None and bits < 8
            if not coarse:
                self.plan.asked |= found.source.norms
            if coarse or found.source.fine:
                return found
        if bits is None or not tensor.requires_grad or tensor.is_leaf:
            return as_is(tensor)
        source = packed(tensor, self.mode.packing(bits), channels, self.unread)
        self.record(tensor, source)
        return Saved(source)

    def _known(self, tensor: Tensor) -> Iterator[tuple[_Entry, Layouts | None]]:
        """The entries of the tensor, or of a dense tensor that it is a view of, then with the layouts of both."""
        entries = self._entries.get(tensor.untyped_storage())
        if entries is None or tensor.is_neg():
            return
        layout, version, dtype = layout_of(tensor), tensor._version, tensor.dtype
        for entry in entries:
            if entry.version == version and entry.dtype == dtype:
                if entry.layout == layout:
                    yield entry, None
                elif fills(entry.layout) and holds(entry.layout, layout):
                    yield entry, (entry.layout, layout)

    def _add(self, tensor: Tensor, **what: Any) -> None:
        if type(tensor) in PLAIN:
            entry = _Entry(tensor._version, layout_of(tensor), tensor.dtype, **what)
            self._entries.setdefault(tensor.untyped_storage(), []).append(entry)


def _order(source: Source) -> tuple[bool, int]:
    return not source.fine, source.cost


def packed(tensor: Tensor, packing: Packing, channels: tuple[int, ...], unread: bool = False) -> Source:
    """A packed copy, in memory order if the tensor is dense.

    Channels are first scaled by powers of two to similar magnitudes. unread: leave the copy unwritten.
    """
    tensor = tensor.detach()
    dense = is_dense(tensor)
    factors = channel_factors(tensor, channels, unread)
    if unread:
        even = torch.empty_like(tensor) if dense else tensor.new_empty(tensor.shape)
        codes, scales = ops.pack_fake(even, *packing)
    else:
        even = tensor / factors if dense else (tensor / factors).contiguous()
        codes, scales = ops.pack(even.as_strided((even.numel(),), (1,)), *packing)
    rebuild = partial(_unpack, size=tuple(even.shape), stride=even.stride(), packing=packing, dtype=tensor.dtype)
    return Source((codes, scales, factors), rebuild, fine=packing.bits >= 8, roots=new_root())


def channel_factors(tensor: Tensor, channels: tuple[int, ...], unread: bool = False) -> Tensor:
    """The power of two nearest to the root mean square of each channel, with `tensor`'s number of dimensions, in its dtype.

    channels: the dimensions that channels are counted along. unread: leave the factors unwritten.
    """
    kept = {channel % tensor.ndim for channel in channels}
    others = [dim for dim in range(tensor.ndim) if dim not in kept]
    if not others:
        return tensor.new_ones([1] * tensor.ndim)
    if unread:
        return tensor.new_empty([size if dim in kept else 1 for dim, size in enumerate(tensor.shape)])
    count = math.prod(tensor.shape[dim] for dim in others)
    wide = torch.promote_types(tensor.dtype, torch.float32)
    size = torch.linalg.vector_norm(tensor, dim=others, keepdim=True, dtype=wide).div_(max(count, 1) ** 0.5)
    return size.clamp_(2.0**-14, 2.0**15).log2_().round_().exp2_().to(tensor.dtype)


def _unpack(
    codes: Tensor,
    scales: Tensor,
    factors: Tensor,
    *,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    packing: Packing,
    dtype: torch.dtype,
) -> Tensor:
    value = ops.unpack(codes, scales, size, *packing, dtype).as_strided(size, stride)
    return value.mul_(factors)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


def again(function: Callable[..., Tensor], *parents: Kept, tensors: tuple[Tensor, ...] = (), cost: int = 0) -> Source:
    """A source that calls `function(*tensors, *parents)` once more; the function itself holds no tensor."""
    fine, heaviest, depth = True, 0, 0
    roots = norms = _NONE
    kept = tuple([as_is(one) for one in tensors])
    reads = read([*kept, *(parent for parent in parents if isinstance(parent, Tensor))])
    for parent in parents:
        if isinstance(parent, Saved):
            source = parent.source
            fine = fine and source.fine
            heaviest, depth = max(heaviest, source.cost), max(depth, source.depth)
            roots, norms, reads = roots | source.roots, norms | source.norms, reads | source.reads
    return Source(kept, function, parents, fine, cost + heaviest, 1 + depth, roots, norms, reads)


_NONE: frozenset[int] = frozenset()
