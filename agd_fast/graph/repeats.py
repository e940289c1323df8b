"""Pieces of a graph that repeat with other weights, as the blocks of a transformer do.

A captured forward no longer has modules, so pieces are found by what they compute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, fx

from agd_fast.graph.capture import kind_of, value_of
from agd_fast.graph.cuts import cuts_of
from agd_fast.graph.levels import is_random, is_view, owners_of, writes
from agd_fast.graph.partition import part_of

LONGEST = 256  # operations of the largest pieces that are looked for
LEAST = 32  # operations that a piece must save: about what compiling one costs, however small
NEARLY = 0.9  # of the best piece's worth: among pieces worth that much, the one with the fewest bytes in and out is taken


@dataclass(frozen=True)
class Call:
    """One run of a piece. arguments, results: nodes of the graph that was cut."""

    piece: fx.GraphModule
    arguments: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]


def calls_of(graph: fx.Graph) -> list[Call]:
    """The graph as calls of pieces, one after another. Calls that compute the same from other arguments share a piece; a graph
    without such calls is one call."""
    repeats = _Repeats(graph)
    known: dict[Hashable, fx.GraphModule] = {}
    calls = []
    for start, stop in pairwise(repeats.bounds()):
        form = repeats.form(start, stop)
        part = part_of(repeats.nodes[start:stop], form.results)
        calls.append(Call(known.setdefault(form.key, part.module), part.arguments, part.results))
    return calls


def operations(graph: fx.Graph) -> int:
    """The number of operations to compile."""
    return sum(map(_weight, graph.nodes))


@dataclass(frozen=True)
class _Form:
    """What a run of nodes computes. key: equal for runs that compute the same from other arguments. passed: bytes that it takes
    from other nodes and gives to them."""

    key: Hashable
    results: tuple[fx.Node, ...]
    passed: int


@dataclass
class _Candidate:
    """A run of atoms that occurs more than once. length: in atoms. weight: in operations. starts: first atoms of the
    occurrences, which may overlap. proven: whether all have the same form; else they only look so."""

    length: int
    weight: int
    starts: list[int]
    proven: bool = False

    def free(self, taken: Sequence[int]) -> list[int]:
        """The starts of occurrences that overlap neither each other nor taken atoms. taken: number of those before each atom."""
        found: list[int] = []
        for start in self.starts:
            if taken[start + self.length] == taken[start] and (not found or start >= found[-1] + self.length):
                found.append(start)
        return found


@dataclass(frozen=True)
class _Choice:
    """A candidate, and the starts of those of its occurrences that can be cut out."""

    candidate: _Candidate
    starts: list[int]

    @property
    def saves(self) -> int:
        """The number of operations saved, less one for each call into which the graph is cut for it."""
        gaps = sum(stop - start > self.candidate.length for start, stop in pairwise(self.starts))
        return (len(self.starts) - 1) * self.candidate.weight - len(self.starts) - gaps

    @property
    def worth(self) -> float:
        """Higher for a short piece that repeats often than for a long one that saves as much: inside the long one, the short
        one would repeat as well."""
        return self.saves * (1 - 1 / len(self.starts)) ** 3


class _Repeats:
    """Finds the pieces of a graph. The nodes between two neighbouring places where it may be cut are an atom; pieces are runs of
    atoms."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes = [node for node in graph.nodes if node.op == "call_function"]
        owners = owners_of(graph)
        written = {owners[node] for node in self.nodes if writes(node)}
        self.alone = {  # equal to no others: what is random, and what writes to arguments
            node for node in self.nodes if is_random(node) or (owners[node] in written and owners[node].op == "placeholder")
        }
        self.cuts = [0, *cuts_of(self.nodes, owners), len(self.nodes)]
        self.taken = [False] * (len(self.cuts) - 1)  # by atom

    def bounds(self) -> list[int]:
        """Where to cut, including both ends."""
        found = {0, len(self.nodes)}
        candidates = self._candidates()
        while (best := self._best(candidates)) is not None:
            for start in best.starts:
                stop = start + best.candidate.length
                found |= {self.cuts[start], self.cuts[stop]}
                self.taken[start:stop] = [True] * best.candidate.length
        return sorted(found)

    def form(self, start: int, stop: int) -> _Form:
        """The form of the nodes from `start` to `stop`."""
        nodes = self.nodes[start:stop]
        own, given = {node: index for index, node in enumerate(nodes)}, dict[fx.Node, int]()

        def name(node: fx.Node) -> Hashable:
            return own[node] if node in own else ("given", given.setdefault(node, len(given)), _kind(node))

        looks = tuple(node if node in self.alone else None for node in nodes), tuple(_look(node, name) for node in nodes)
        results = tuple(node for node in nodes if any(user not in own for user in node.users))
        passed = [*results, *(node for node in given if node.op == "call_function")]
        return _Form((looks, tuple(own[node] for node in results)), results, sum(value_of(node).nbytes for node in passed))

    def _candidates(self) -> list[_Candidate]:
        """All runs of atoms that look the same as at least one other."""
        numbers: dict[Hashable, int] = {}

        def number(one: Hashable) -> int:
            return numbers.setdefault(one, len(numbers))

        looks = [number(node if node in self.alone else _look(node)) for node in self.nodes]
        atoms = [number(("atom", *looks[start:stop])) for start, stop in pairwise(self.cuts)]
        weights = [sum(map(_weight, self.nodes[start:stop])) for start, stop in pairwise(self.cuts)]
        found: dict[int, _Candidate] = {}
        for start in range(len(atoms)):
            run, weight = -1, 0
            for stop in range(start, len(atoms)):
                run, weight = number((run, atoms[stop])), weight + weights[stop]
                if weight > LONGEST:
                    break
                found.setdefault(run, _Candidate(stop + 1 - start, weight, [])).starts.append(start)
        return [one for one in found.values() if len(one.starts) > 1]

    def _best(self, candidates: list[_Candidate]) -> _Choice | None:
        """The piece to cut out next, and where. Forgets candidates that save too little by now."""
        taken = list(accumulate(self.taken, initial=0))
        while True:
            choices = [_Choice(one, one.free(taken)) for one in candidates]
            choices = [one for one in choices if one.starts and one.saves >= LEAST]
            candidates[:] = [one.candidate for one in choices]
            if not choices:
                return None
            most = max(one.worth for one in choices)
            near = [one for one in choices if one.worth >= NEARLY * most]
            unproven = [one.candidate for one in near if not one.candidate.proven]
            if not unproven:
                return min(near, key=lambda one: (self._form(one.candidate, one.starts[0]).passed, -one.worth))
            for candidate in unproven:
                candidates.remove(candidate)
                candidates += self._proven(candidate)

    def _proven(self, candidate: _Candidate) -> list[_Candidate]:
        """A candidate for each form that its occurrences have."""
        forms: dict[Hashable, list[int]] = defaultdict(list)
        for start in candidate.starts:
            forms[self._form(candidate, start).key].append(start)
        return [_Candidate(candidate.length, candidate.weight, starts, proven=True) for starts in forms.values()]

    def _form(self, candidate: _Candidate, start: int) -> _Form:
        return self.form(self.cuts[start], self.cuts[start + candidate.length])


def _weight(node: fx.Node) -> int:
    return int(node.op == "call_function" and not is_view(node))


def _kind(node: fx.Node) -> Any:
    """dtype, device, shape and strides of a tensor, or of each in a list; the type of a number."""
    value = value_of(node)
    if isinstance(value, (list, tuple)):
        return tuple((one.dtype, one.device, one.shape, one.stride()) if isinstance(one, Tensor) else type(one) for one in value)
    return kind_of(node) if isinstance(value, Tensor) else type(value)


def _look(node: fx.Node, name: Any = _kind) -> Hashable:
    """What a node does to its inputs, each of which is identified by `name`."""

    def plain(value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            return name(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(plain, value))
        return type(value), repr(value)  # 1, 1.0 and True are not the same

    return node.target, plain(node.args), tuple((key, plain(value)) for key, value in node.kwargs.items()), _kind(node)
