"""The rest of a step as pieces that repeat: each is compiled once, and called with the weights of one block after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.backend.torch_versions import CompiledFn, compile_with, inductor_options
from agd_fast.graph.partition import Part
from agd_fast.graph.repeats import Call

Compile = Callable[[fx.GraphModule, list[Tensor]], CompiledFn]  # compiles a piece for arguments like these


class Pieces:
    """A part of the forward as calls of pieces. Each is compiled at its first call, and again for arguments of other strides."""

    def __init__(self, part: Part, calls: Sequence[Call], compile: Compile) -> None:
        graph = part.module.graph
        (output,) = graph.find_nodes(op="output")
        places = {node: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
        for call in calls:
            places.update({node: len(places) + index for index, node in enumerate(call.results)})
        self.results = [places[node] for node in output.args[0]]
        self.calls: list[tuple[fx.GraphModule, list[int], list[int]]] = []  # piece, arguments, those of them not used later
        used = set(self.results)
        for call in reversed(calls):
            taken = [places[node] for node in call.arguments]
            self.calls.insert(0, (call.piece, taken, list(set(taken) - used)))
            used.update(taken)
        self.compile = compile
        self.compiled: dict[Any, CompiledFn] = {}  # by piece and the strides of its arguments
        self.functions: dict[Any, list[CompiledFn]] = {}  # one a call, by the strides of all arguments

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        values: list[Any] = list(arguments)
        functions = self.functions.setdefault(_strides(arguments), [])
        for index, (piece, taken, done) in enumerate(self.calls):
            given = [values[place] for place in taken]
            if index == len(functions):
                functions.append(self._compiled(piece, given))
            values += functions[index](*given)
            for place in done:
                values[place] = None
        return [values[place] for place in self.results]

    def info(self) -> dict[str, int]:
        """For display. compiled: number of distinct pieces. calls: number of calls of these in a step."""
        return {"compiled": len({piece for piece, _, _ in self.calls}), "calls": len(self.calls)}

    def _compiled(self, piece: fx.GraphModule, given: list[Tensor]) -> CompiledFn:
        key = piece, _strides(given)
        if key not in self.compiled:
            self.compiled[key] = self.compile(piece, given)
        return self.compiled[key]


def by_inductor(mode: str | None) -> Compile:
    """Compilation by inductor. mode: the `mode` of torch.compile."""
    options = inductor_options(mode)

    def compile(piece: fx.GraphModule, given: list[Tensor]) -> CompiledFn:
        with torch.no_grad():
            return compile_with("inductor", piece, given, options)

    return compile


def _strides(tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(Tensor.stride, tensors))
