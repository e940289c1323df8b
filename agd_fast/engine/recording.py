"""A recorded forward: its programs, and what they prepare in a scope."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agd_fast.attaching.scope import Scope
from agd_fast.engine.asked import Asked
from agd_fast.engine.fingerprint import version
from agd_fast.engine.program import Prepared, Program
from agd_fast.engine.request import Request
from agd_fast.graph.levels import Level
from agd_fast.spec import DenoiserSpec

VALUES = 2  # that a static argument may have in one scope: conditional and unconditional forwards may alternate

Value = tuple[Tensor, int | None]  # of an argument: a tensor, and how often it was written to


@dataclass(eq=False)
class _Run:
    """What was prepared for one set of static inputs and one schedule."""

    static: list[Value]
    timesteps: Tensor | None
    prepared: Prepared


@dataclass(eq=False)
class Use:
    """The use of a recording in one scope. bytes: size of what its runs hold. seen: distinct values of the inputs that changed
    within an earlier scope, as many as it takes to tell whether they change within this one."""

    program: Program
    runs: list[_Run] = field(default_factory=list)
    bytes: int = 0
    seen: list[list[Value]] = field(default_factory=list)


class Recording:
    """output: the tree structure of the forward's output. asked: the values for which the recording is valid.

    program: takes the static inputs as constant within a scope. If some of them change within a later scope, `finer` is made in
    addition, for which they are not static: it runs in the next scope too, as long as they changed in the last one. If they
    change in the first scope already, the finer program replaces `program`.
    """

    def __init__(self, program: Program, output: Any, asked: Asked) -> None:
        self.program, self.output, self.asked = program, output, asked
        self.finer: Program | None = None
        self._moved = False  # whether inputs that `program` takes for static changed within the newest scope
        self._served = False  # whether `program` was enough for a whole scope
        self._serves = False  # and for the newest one, so far

    @property
    def programs(self) -> list[Program]:
        return [self.program] if self.finer is None else [self.program, self.finer]

    def use(self, scope: Scope) -> Use:
        """The use in this scope."""
        found: Use | None = scope.store.get(self)
        if found is None:
            program = self.finer if self._moved and self.finer is not None else self.program
            found = scope.store[self] = Use(program)
            self._moved, self._served, self._serves = False, self._served or self._serves, True
        return found

    def prepared(self, use: Use, request: Request, timesteps: Tensor | None, spec: DenoiserSpec) -> Prepared:
        """What was prepared in this scope for the static inputs of this request; if nothing was, it is prepared now, perhaps by
        another program, which the scope then uses."""
        if use.program is self.finer:
            self._look_whether_moved(use, request)
        static = _values(request, use.program.of_level(Level.STATIC))
        found = _known(use.runs, static, timesteps)
        if found is None:
            self._let_move(use, request, static)
            found = self._prepare(use, request, timesteps, spec)
        return found

    def _look_whether_moved(self, use: Use, request: Request) -> None:
        if self._moved:
            return
        cut = [index for index in self.program.of_level(Level.STATIC) if use.program.levels[index] == Level.MOVING]
        values = _values(request, cut)
        if not any(all(map(_is_same, values, known)) for known in use.seen):
            use.seen.append(values)
            self._moved = any(map(_moves, zip(*use.seen, strict=True)))

    def _let_move(self, use: Use, request: Request, static: Sequence[Value]) -> None:
        """Change to a finer program if static inputs turn out to change; what the old one prepared is dropped."""
        values = zip(*[run.static for run in use.runs], static, strict=True)
        moving = [index for index, known in zip(use.program.of_level(Level.STATIC), values, strict=True) if _moves(known)]
        if not moving:
            return
        use.runs.clear()
        use.seen.clear()
        self._serves = False
        if not self._served:
            use.program = self.program = self.program.moving(moving)
            return
        if self.finer is None or any(self.finer.levels[index] != Level.MOVING for index in moving):
            self.finer = (self.finer or self.program).moving(moving)
        use.program, self._moved = self.finer, True

    def _prepare(self, use: Use, request: Request, timesteps: Tensor | None, spec: DenoiserSpec) -> Prepared:
        static = _values(request, use.program.of_level(Level.STATIC))
        rows = None if timesteps is None else request.rows(timesteps, spec)
        prepared = use.program.prepare(request.inputs, rows, None if rows is None else request.steps(rows))
        use.runs[:] = [*use.runs[-VALUES + 1 :], _Run(static, timesteps, prepared)]
        use.bytes = sum(run.prepared.bytes for run in use.runs)
        return prepared


def _values(request: Request, indices: Iterable[int]) -> list[Value]:
    return [(request.inputs[index], version(request.inputs[index])) for index in indices]


def _known(runs: Sequence[_Run], static: Sequence[Value], timesteps: Tensor | None) -> Prepared | None:
    return next((run.prepared for run in runs if timesteps is run.timesteps and all(map(_is_same, static, run.static))), None)


def _is_same(one: Value, other: Value) -> bool:
    return one[0] is other[0] and one[1] == other[1]


def _moves(values: Sequence[Value]) -> bool:
    """Whether an argument has more values in one scope than a static one may, or its changes cannot be seen."""
    return None in {count for _, count in values} or len({(id(tensor), count) for tensor, count in values}) > VALUES
