"""What a graph computes of weights alone, as joined and cast ones: once for all calls with the same weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from agd_fast.graph.partition import Part


@dataclass(eq=False)
class _Entry:
    weights: list[weakref.ref[Tensor]]
    stamps: list[tuple[int, int]]
    values: list[Tensor]


class Once:
    """`part` of inputs, by their places, and of constants: computed anew for other weights, for ones that were written to, and
    for ones whose memory was exchanged. One graph may serve many blocks with weights of their own."""

    def __init__(self, part: Part, arguments: Sequence[int | Tensor]) -> None:
        self.part, self.arguments = part, list(arguments)
        self.entries: dict[tuple[int, ...], _Entry] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if not self.part.results:
            return []
        weights = [argument if isinstance(argument, Tensor) else inputs[argument] for argument in self.arguments]
        key = tuple(map(id, weights))
        stamps = [(weight.data_ptr(), _version(weight)) for weight in weights]
        entry = self.entries.get(key)
        if entry is None or entry.stamps != stamps or not _are(entry.weights, weights):
            gone = [other for other, kept in self.entries.items() if any(ref() is None for ref in kept.weights)]
            for other in gone:
                del self.entries[other]
            entry = _Entry([weakref.ref(weight) for weight in weights], stamps, self.part.module.forward(*weights))
            self.entries[key] = entry
        return entry.values


def _are(references: Sequence[weakref.ref[Tensor]], weights: Sequence[Tensor]) -> bool:
    return all(reference() is weight for reference, weight in zip(references, weights, strict=True))


def _version(weight: Tensor) -> int:
    """Of inference tensors nobody counts the writes; they cannot be written to by most operations either."""
    return -1 if weight.is_inference() else weight._version
