"""A forward at fixed shapes, ready to run: captured, cut by what it depends on, compiled, and put into a CUDA graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.engine.config import EngineConfig
from agd_fast.engine.copies import Copies, cat
from agd_fast.engine.graphs import GraphedStep, Recorded
from agd_fast.engine.pieces import Pieces, by_inductor
from agd_fast.engine.tables import RowLayout, Rows, Table, fill_rows, index_of
from agd_fast.graph.capture import Captured, value_of
from agd_fast.graph.levels import Level, leading_to, levels_of
from agd_fast.graph.merging import CENTRED
from agd_fast.graph.partition import Part, part_of, partition
from agd_fast.graph.projections import leaves_card_idle
from agd_fast.graph.repeats import calls_of, operations
from agd_fast.graph.rewriting import rewrite
from agd_fast.ops import Kernels, WriteMerged, centre, default_policy
from agd_fast.warning import described, first_line

MANY = 200  # operations: compiling that many takes noticeable time, calling so few pieces does not

Values = dict[fx.Node, Tensor]
ByDtype = dict[torch.dtype, Tensor]


@dataclass(frozen=True)
class Prepared:
    """What was computed ahead for one run: all that does not change with x_t.

    static: what does not change at all; in a program that records graphs it is in `packed` instead, one row for each dtype.
    table: what changes with the step, where the schedule is known. serial: a number that no other has.
    """

    static: Values
    packed: ByDtype
    table: Table | None
    serial: int = field(default_factory=itertools.count(1).__next__)

    @property
    def bytes(self) -> int:
        """Size of the memory that is held for it."""
        held = [*self.static.values(), *self.packed.values()]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in held}
        return sum(storages.values()) + (self.table.bytes if self.table else 0)


class Program:
    """levels: one for each input, in the order of the capture. timestep: which input is t. copies: shared with other programs."""

    def __init__(
        self, captured: Captured, levels: Sequence[Level], timestep: int, config: EngineConfig, copies: Copies | None = None
    ) -> None:
        self.copies = Copies() if copies is None else copies
        self.inputs, self.levels, self.timestep, self.config = captured.inputs, list(levels), timestep, config
        self.graph = captured.graph
        self.trouble = ""  # why steps are slower than they might be
        self.packing: RowLayout | None = None  # of the static results
        self.constants: Values = dict(captured.constants)
        self.untaken: list[fx.Node] = []  # those of them whose channels-last copies nothing reads
        self.computed: list[
            tuple[Tensor, Part, list[int | None]]
        ] = []  # further constants, what computes their pieces, and the lengths of zeros between these
        self.device = _device([node for node, level in self._leveled if level == Level.MOVING])
        self.compiles, self.graphs = config.compiles(self.device), config.graphs(self.device)
        self.repeated_blocks = config.repeated_blocks
        self.policy = policy = self.config.kernels or default_policy()
        join = {None: leaves_card_idle, True: lambda x, rows: True, False: None}[config.join_projections]
        gelu: Kernels = {None: "auto", True: "always", False: "never"}[config.gelu_epilogue]  # type: ignore[assignment]
        self.rewritten = rewrite(
            self.graph,
            dict(self._leveled),
            policy,
            self._constant,
            fold=config.fold,
            merge=config.merge and config.hoist,
            join=join,
            gelu_epilogue=gelu,
        )
        self.kept = self.rewritten.kept
        if not config.hoist:
            self.kept = frozenset(self.graph.nodes)
        self._cut()

    def _cut(self) -> None:
        self.twins = self._twins()
        self.parts = parts = partition(self.graph, dict(self._leveled), self.kept, frozenset(self.twins))
        values = [node.meta["val"] for node in parts.step.results]
        self.layout = RowLayout(tuple(tuple(value.shape) for value in values), tuple(value.dtype for value in values))
        self.rows = self.layout.empty_rows(self.device)
        self.places = self.layout.views(self.rows)
        stored = dict(zip(parts.step.results, self.places, strict=True))
        row_values: Values = {**stored, **dict(zip(parts.views.results, parts.views(stored), strict=True))}
        self.known = known = {**self.constants, **row_values, **self.twins}  # the same tensors at every step
        self.wired = [(node, known.get(node)) for node in parts.body.arguments]
        kept = row_values.keys() | {*parts.once.results}  # memory that the next step writes to or reads
        self.is_kept = [node in kept for node in parts.body.results]
        self.body: Callable[..., Any] = parts.body.module.forward
        if self.compiles:
            self.body = self._in_pieces(parts.body) or self._compiled_whole(parts.body)
        self.graphed: GraphedStep | None = None
        self.recorded, self.borrowed, self.packing = Recorded(self.device), Values(), None
        self.write_merged = WriteMerged(self.policy)  # its tables are those of this program's graph
        read = {*parts.body.arguments, *parts.step.arguments} - self.constants.keys()
        if self.graphs and any(node.meta["val"].device != self.device for node in read):
            self.graphs, self.trouble = False, "a step reads tensors of other devices, so it is launched operation by operation"

    def _constant(self, pieces: Sequence[fx.Node | int]) -> fx.Node | None:
        """One more constant, joined from zeros and what is made of the model's tensors alone; None where that cannot be."""
        results = [piece for piece in pieces if isinstance(piece, fx.Node)]
        made = part_of([node for node in leading_to(results) if node.op == "call_function"], results)
        if not made.arguments or not self.constants.keys() >= {*made.arguments}:
            return None
        zeros = [piece if isinstance(piece, int) else None for piece in pieces]
        if made.is_empty:
            joined = self.copies.joined(_filled(zeros, made(self.constants)))
        else:
            joined = cat(_filled(zeros, made(self.constants)))
            self.computed.append((joined, made, zeros))
        with self.graph.inserting_after(next(reversed(self.constants))):
            node = self.graph.placeholder(f"joined_{len(self.constants)}")
        node.meta["val"] = value_of(next(iter(self.constants))).fake_mode.from_tensor(joined)
        self.constants[node] = joined
        return node

    def _twins(self) -> Values:
        """Copies of the weights whose low-rank terms change at every step: each step writes their centres. Where nothing else
        reads such a weight, it needs no channels-last copy besides."""
        for node in self.untaken:  # it may be read now
            self.constants[node] = self.copies.channels_last(self.constants[node])
        level = levels_of(self.graph, dict(self._leveled))
        nodes = self.graph.find_nodes(op="call_function", target=CENTRED)
        found = [node for node in nodes if level[node] == Level.STEP and node not in self.kept and node.args[0] in self.constants]
        weights = {node: self.constants[node.args[0]] for node in found}
        twins = {node: self.copies.twin(weight, value_of(node).stride()) for node, weight in weights.items()}
        self.centres = [self.copies.centre(weight) for weight in weights.values()]
        self.untaken = []
        for node, weight in weights.items():
            own = self.copies.own(weight)
            if own is not weight and twins.keys() >= node.args[0].users.keys():
                self.constants[node.args[0]] = own
                self.untaken.append(node.args[0])
        return twins

    def renew(self) -> None:
        """Recompute the constants made of the model's tensors alone, from what these are now."""
        for joined, made, zeros in self.computed:
            cat(_filled(zeros, made(self.constants)), joined)

    def _in_pieces(self, body: Part) -> Pieces | None:
        """The body with what repeats compiled once; None where that is not wanted, or would save little."""
        wanted = self.repeated_blocks
        if wanted is False:
            return None
        calls = calls_of(body.module.graph)
        total, distinct = operations(body.module.graph), sum(operations(one.graph) for one in {call.piece for call in calls})
        if len(calls) < 2 or (wanted is None and total - distinct < max(total / 2, MANY)):
            return None
        return Pieces(body, calls, by_inductor(self.config.mode))

    def _compiled_whole(self, body: Part) -> Callable[..., Any]:
        return torch.compile(body.module, fullgraph=True, dynamic=False, mode=self.config.mode)

    @property
    def pieces(self) -> dict[str, int]:
        """For display; empty where the body is compiled as a whole, or not at all."""
        return self.body.info() if isinstance(self.body, Pieces) else {}

    def do_without_compiling(self, error: Exception) -> None:
        """Compile the body as a whole where pieces cannot be compiled, and not at all where that fails, too."""
        if isinstance(self.body, Pieces):
            self.repeated_blocks, self.body = False, self._compiled_whole(self.parts.body)
            self.trouble = f"repeated blocks could not be compiled once ({described(error)}), so all of a step is compiled"
        else:
            self.compiles, self.body = False, self.parts.body.module.forward
            self.trouble = f"torch.compile failed ({described(error)}), so steps run uncompiled"

    def moving(self, indices: Collection[int]) -> Program:
        """Another program of the same forward, for which these inputs change at every step. Both may run, one after the other."""
        other = copy(self)
        other.levels = [Level.MOVING if index in indices else level for index, level in enumerate(self.levels)]
        other.constants = dict(self.constants)
        other._cut()
        return other

    def of_level(self, level: Level) -> list[int]:
        return [index for index, found in enumerate(self.levels) if found == level]

    def prepare(self, inputs: Sequence[Tensor], rows: Rows | None = None, steps: Mapping[int, Tensor] | None = None) -> Prepared:
        """What does not depend on x_t, with a table of all steps if these are given, unless it is larger than the config allows.

        inputs: of any step. rows: of the table. steps: values [R, …] of the inputs that change with the step, by index.
        """
        given = [inputs[index] for index in self.of_level(Level.STATIC)]
        if rows is None or not self.places or (len(rows.times) + 1) * self.layout.row_bytes > self.config.max_table_bytes:
            rows, steps = None, {}
        if self.packing is None:
            self._look_at_static(given)
        static, packed, filled = self._ahead(given, steps or {}) if not self.graphs else self._packed_ahead(given, steps or {})
        return Prepared(static, packed, None if rows is None else Table(filled, index_of(rows, self.device)))

    def _look_at_static(self, given: Sequence[Tensor]) -> None:
        """Find which static results are the model's own memory, which is borrowed, and the layout in which the rest is packed."""
        results = dict(zip(self.parts.once.results, self.parts.once(self._given(given)), strict=True))
        own = {tensor.untyped_storage()._cdata for tensor in self.constants.values()}
        self.borrowed = {node: tensor for node, tensor in results.items() if tensor.untyped_storage()._cdata in own}
        self.packing = RowLayout.of([tensor for node, tensor in results.items() if node not in self.borrowed])

    @property
    def _made(self) -> list[fx.Node]:
        """The static results that are not borrowed."""
        return [node for node in self.parts.once.results if node not in self.borrowed]

    def _given(self, given: Sequence[Tensor]) -> Values:
        """The values of the static inputs and of the constants."""
        return {**self.constants, **{self.inputs[i]: one for i, one in zip(self.of_level(Level.STATIC), given, strict=True)}}

    def _ahead(self, given: Sequence[Tensor], steps: Mapping[int, Tensor]) -> tuple[Values, ByDtype, ByDtype]:
        """The static results, none of them packed, and the rows of the table."""
        values = self._given(given)
        static = dict(zip(self.parts.once.results, self.parts.once(values), strict=True))
        own = {node: static[node] for node in self._made}
        if not steps:
            return own, {}, {}
        moving = {self.inputs[index]: found for index, found in steps.items()}
        values = {**values, **static, **moving}
        nodes = self.parts.step.arguments
        dims = tuple(0 if node in moving else None for node in nodes)
        columns = at_all_steps(self.parts.step.module.forward, [values[node] for node in nodes], dims)
        return own, {}, fill_rows(self.layout, columns)

    def _packed_ahead(self, given: Sequence[Tensor], steps: Mapping[int, Tensor]) -> tuple[Values, ByDtype, ByDtype]:
        """The same, packed; computed as one CUDA graph from the second time at the same shapes on."""
        assert self.packing is not None
        packing, count = self.packing, len(given)

        def compute(tensors: Sequence[Tensor]) -> list[Tensor]:
            static, _, filled = self._ahead(tensors[:count], dict(zip(steps, tensors[count:], strict=True)))
            return [*packing.packed([*static.values()], self.device).values(), *filled.values()]

        found = self.recorded(compute, [*given, *steps.values()], tuple(steps))
        dtypes = [*packing.offsets[1]]
        filled = dict(zip(self.layout.offsets[1], found[len(dtypes) :], strict=True)) if steps else {}
        return {}, dict(zip(dtypes, found, strict=False)), filled

    def run(self, inputs: Sequence[Tensor], prepared: Prepared, number: Tensor | None = None) -> list[Tensor]:
        """The forward's outputs. number: that of the step [1], where ω changes with the step."""
        if not self.graphs:
            return self.step(inputs, prepared, number)
        moving = [tensor for tensor, level in zip(inputs, self.levels, strict=True) if level != Level.STATIC]
        moving += [] if number is None else [number]
        kept = self._kept(inputs, prepared)
        if self.graphed is None or not self.graphed.fits(kept):
            self.graphed = None  # free its memory first
            try:
                self.graphed = GraphedStep(
                    lambda moving, kept: self.step(*self._taken(moving, kept, prepared)),
                    self.device,
                    moving,
                    kept,
                    prepared.serial,
                )
            except RuntimeError as error:
                self.graphs = False
                self.trouble = f"no CUDA graph could be recorded ({first_line(error)}), so steps are launched one by one"
                return self.step(inputs, prepared, number)
        return self.graphed(moving, kept, prepared.serial)

    def step(self, inputs: Sequence[Tensor], prepared: Prepared, number: Tensor | None = None) -> list[Tensor]:
        """`run` without a CUDA graph."""
        given = {**self._static(prepared), **self.borrowed, **dict(zip(self.inputs, inputs, strict=True))}
        if prepared.table is not None:
            prepared.table.copy_row(inputs[self.timestep], number, self.rows)
        elif self.places:
            for place, found in zip(self.places, self.parts.step({**self.constants, **given}), strict=True):
                place.copy_(found)
        self._write_twins(given)
        results = self.body(*[given[node] if known is None else known for node, known in self.wired])
        return [result.clone() if is_kept else result for result, is_kept in zip(results, self.is_kept, strict=True)]

    def _write_twins(self, given: Values) -> None:
        """Write this step's low-rank terms into the twins."""
        low = [[given[one] if one in given else self.known[one] for one in node.args[1:]] for node in self.twins]  # type: ignore[index]
        outs = [centre(twin) for twin in self.twins.values()]
        self.write_merged(outs, self.centres, [up for up, _ in low], [down for _, down in low])

    def _static(self, prepared: Prepared) -> Values:
        """Values of the static results that are not borrowed."""
        if not prepared.packed:
            return prepared.static
        assert self.packing is not None
        return dict(zip(self._made, self.packing.views(prepared.packed), strict=True))

    def _kept(self, inputs: Sequence[Tensor], prepared: Prepared) -> list[Tensor]:
        table = prepared.table
        return [
            *(inputs[index] for index in self.of_level(Level.STATIC)),
            *prepared.packed.values(),
            *([] if table is None else [*table.rows.values(), *table.index]),
        ]

    def _taken(
        self, moving: Sequence[Tensor], kept: Sequence[Tensor], prepared: Prepared
    ) -> tuple[list[Tensor], Prepared, Tensor | None]:
        """The arguments of `step`, taken from `moving` and from copies of what `_kept` gave."""
        own, rest = iter(kept), iter(moving)
        inputs = [next(own if level == Level.STATIC else rest) for level in self.levels]
        packed = {dtype: next(own) for dtype in prepared.packed}
        table = prepared.table
        if table is not None:
            table = Table({dtype: next(own) for dtype in table.rows}, tuple(own))
        return inputs, Prepared({}, packed, table), next(rest, None)

    @property
    def _leveled(self) -> list[tuple[fx.Node, Level]]:
        return list(zip(self.inputs, self.levels, strict=True))


def at_all_steps(
    function: Callable[..., list[Tensor]], arguments: Sequence[Tensor], dims: tuple[int | None, ...]
) -> list[Tensor]:
    """The results of `function` at every step, stacked [T, …]: computed in one batch, or one step after another where an
    operation has no batched form."""
    try:
        return torch.func.vmap(function, in_dims=dims)(*arguments)
    except RuntimeError:
        count = next(len(argument) for argument, dim in zip(arguments, dims, strict=True) if dim is not None)
        steps = [
            function(*[argument if dim is None else argument[index] for argument, dim in zip(arguments, dims, strict=True)])
            for index in range(count)
        ]
        return [torch.stack(column) for column in zip(*steps, strict=True)]


def _filled(zeros: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor | int]:
    """`zeros` with its Nones replaced by the tensors."""
    rest = iter(tensors)
    return [next(rest) if length is None else length for length in zeros]


def _device(nodes: Iterable[fx.Node]) -> torch.device:
    return next(iter(nodes)).meta["val"].device
