"""Operations that need not run: those that change nothing, those that run twice, and rows that a norm can take as its own.

A norm followed by a scale and a shift that do not depend on x_t (adaLN, and modulation adapters on norms) is a norm with
another γ and β. PyTorch's layer norms have one γ for all samples of a batch, so theirs are folded where the batch is one sample;
group norms where all channels of all samples lie one after another. Norms of ours have one γ a sample, and take the SiLU too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast import ops
from agd_fast.graph.capture import add_call, arguments_of, kind_of, schema_name, value_of
from agd_fast.graph.fusing import Fusing, only_user
from agd_fast.graph.levels import Level, in_place_groups, is_random, memories_of

aten = torch.ops.aten

_NORMS = ("aten::layer_norm", "aten::group_norm")  # (x, shape or groups, weight, bias, eps, …)
_CASTS = ("aten::to", "aten::contiguous", "aten::alias", "aten::detach", "aten::dropout", "aten::lift_fresh")
_NEUTRAL = {"aten::div": 1, "aten::mul": 1, "aten::add": 0, "aten::sub": 0}


def drop_needless(graph: fx.Graph) -> None:
    """Operations that change nothing, and those that run twice."""
    written, seen = in_place_groups(graph), _Seen(graph)
    _drop_identities(graph, written, seen)
    _share_equals(graph, written, seen)


def _drop_identities(graph: fx.Graph, written: set[fx.Node], seen: _Seen) -> None:
    """x / 1, x · 1, x + 0, x − 0, and casts and dropout that do nothing, in the same dtype and layout, are x."""
    for node in list(graph.nodes):
        if not (_is_neutral(node) or schema_name(node) in _CASTS) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        x = node.args[0]  # where it is written to, or this is, it may be kept as it was by a copy
        if written.isdisjoint([node, x]) and kind_of(x) == kind_of(node) and not is_random(node):
            seen.replace(node, x)


def _is_neutral(node: fx.Node) -> bool:
    neutral = _NEUTRAL.get(schema_name(node))
    if neutral is None or len(node.args) != 2 or node.kwargs or isinstance(node.args[1], fx.Node):
        return False
    return bool(node.args[1] == neutral)


def _share_equals(graph: fx.Graph, written: set[fx.Node], seen: _Seen) -> None:
    """Operations on the same arguments are one: DiT's blocks take the sines of t each for itself."""
    found: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_random(node) or not written.isdisjoint([node, *node.all_input_nodes]):
            continue  # what is read before and after it is written is not the same
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if found.setdefault(key, node) is not node:
            seen.replace(node, found[key])


class _Seen:
    """Memory that a caller sees: of what it gives, and of what it gets. It may write to either, so no two of these become one."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = [node for node in graph.nodes if node.op == "placeholder"] + graph.output_node().all_input_nodes
        self.memories = set[int]().union(*map(memories_of, nodes))
        self.became: dict[int, set[int]] = {}  # by memory, all that is one with it now

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Put another node in the place of one, but where a caller would see it."""
        own, its = self._of(node), self._of(other)
        if own != its and own & self.memories and its & self.memories:
            return
        self.became |= dict.fromkeys(own | its, own | its)
        node.replace_all_uses_with(other)
        node.graph.erase_node(node)

    def _of(self, node: fx.Node) -> set[int]:
        return set[int]().union(*(self.became.get(memory, {memory}) for memory in memories_of(node)))


def _hashable(value: Any) -> Any:
    """With the type of what is no tensor: 1, 1.0 and True are not the same argument."""
    if isinstance(value, Mapping):
        return tuple((name, _hashable(inner)) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def fold_into_norms(graph: fx.Graph, level: Mapping[fx.Node, Level], fusing: Fusing | None = None) -> None:
    """level: of the nodes. fusing: where norms may be put on kernels."""
    written = in_place_groups(graph)
    for node in list(graph.nodes):
        if schema_name(node) in _NORMS and level[node] == Level.MOVING and not written.intersection(node.all_input_nodes):
            _Norm(graph, node, fusing, written).fold()


class _Norm:
    """A norm, and the operations behind it that scale and shift it by rows: ("scale", γ), ("one_plus", δ) or ("shift", β).

    As each of these is all that takes the one before, no row can come of the norm.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, fusing: Fusing | None, written: set[fx.Node]) -> None:
        self.graph, self.node, self.fusing, self.written = graph, node, fusing, written
        self.value: Tensor = value_of(node)
        self.grouped = schema_name(node) == "aten::group_norm"
        self.end = node  # of what is folded
        self.operations: list[tuple[str, fx.Node]] = []

    def fold(self) -> None:
        while self._takes(list(self.end.users)):
            pass
        if self.end in self.written:  # what takes its place would be, too
            return
        if self._on_kernel():
            return
        if self.operations and self._in_torch():
            self._replace()

    def _in_torch(self) -> bool:
        """Whether PyTorch's own norm can take the rows."""
        own = [value_of(one) for one in self.node.args[2:4] if isinstance(one, fx.Node)]
        if any(one.dtype != self.value.dtype for one in own):  # γ and β are to be of one
            return False
        if not self.grouped:
            return not self.batched
        return len(self.value) == 1 or bool(value_of(self.node.args[0]).is_contiguous())  # type: ignore[arg-type]

    @property
    def channels(self) -> tuple[int, ...]:
        """The shape of a row."""
        return tuple(self.value.shape[:2]) if self.grouped else tuple(self.node.args[1])  # type: ignore[arg-type]

    @property
    def batched(self) -> bool:
        """Whether rows differ from sample to sample."""
        return any(value_of(row).numel() > math.prod(self.channels) for _, row in self.operations)

    def _on_kernel(self) -> bool:
        """Whether a norm of ours takes its place: a group norm with the SiLU behind it, a layer norm with rows a sample."""
        after = only_user(self.end)
        silu = self.grouped and after is not None and schema_name(after) == "aten::silu" and after not in self.written
        if self.fusing is None or not (silu or (not self.grouped and self.batched and len(self.channels) == 1)):
            return False
        end = after if silu else self.end
        assert end is not None
        x, groups, weight, bias, eps = arguments_of(self.node, None, None, None, None, 1e-5)[:5]
        with self.graph.inserting_before(end):
            gamma, beta = map(self._as_rows, self._folded(weight, bias))
        op: ops.Op = ops.ada_group_norm if self.grouped else ops.ada_layer_norm
        args: tuple[Any, ...] = (x, groups, gamma, beta, eps, True) if self.grouped else (x, gamma, beta, eps)
        if not self.fusing.takes(op, *args):
            return False
        return self.fusing.replaces(op, end, self.fusing.put(op, *args, before=end)[0])

    def _as_rows(self, row: Any) -> Any:
        """γ or β as [B or 1, C]."""
        return None if row is None else self._call(aten.view.default, row, [-1, self.channels[-1]])

    def _is_row(self, node: Any) -> bool:
        """Whether it has one number a channel of the norm, and one alone: it is broadcast over everything else."""
        if not isinstance(node, fx.Node) or node in self.written:  # it is read later than before
            return False
        value = value_of(node)
        if not isinstance(value, Tensor) or value.dtype != self.value.dtype or value.ndim > self.value.ndim:
            return False
        ones = (1,) * (self.value.ndim - len(self.channels))
        expected = (*self.channels, *ones) if self.grouped else (*ones, *self.channels)
        shape = (1,) * (self.value.ndim - value.ndim) + tuple(value.shape)
        batched = (self.value.shape[0], *expected[1:])  # a row for each sample, which is for kernels of ours
        return shape == expected or (not self.grouped and self.fusing is not None and len(ones) > 0 and shape == batched)

    def _takes(self, users: list[fx.Node]) -> bool:
        """Whether what follows is folded too."""
        if any(user.kwargs for user in users):
            return False
        names = sorted(schema_name(user) for user in users)
        if names == ["aten::add", "aten::addcmul"]:
            return self._takes_affine(*sorted(users, key=schema_name))
        if len(users) != 1:
            return False
        user, n = users[0], self.end
        if names == ["aten::addcmul"] and user.args[:2] == (n, n) and self._is_row(user.args[2]):
            self.operations.append(("one_plus", user.args[2]))  # type: ignore[arg-type]
        elif names[0] in ("aten::mul", "aten::add") and len(user.args) == 2:
            row = user.args[1] if user.args[0] is n else user.args[0]
            if not self._is_row(row):
                return False
            self.operations.append(("scale" if names == ["aten::mul"] else "shift", row))  # type: ignore[arg-type]
        else:
            return False
        self.end = user
        return True

    def _takes_affine(self, outer: fx.Node, inner: fx.Node) -> bool:
        """n + addcmul(β, n, γ)."""
        beta, n, gamma = inner.args
        if n is not self.end or outer.args != (n, inner) or len(inner.users) != 1:
            return False
        if not (self._is_row(beta) and self._is_row(gamma)):
            return False
        self.operations += [("one_plus", gamma), ("shift", beta)]  # type: ignore[list-item]
        self.end = outer
        return True

    def _replace(self) -> None:
        arguments = [*self.node.args, None, None]
        del arguments[max(len(self.node.args), 4) :]
        with self.graph.inserting_before(self.end):
            weight, bias = map(self._flat, self._folded(arguments[2], arguments[3]))
            x = arguments[0]
            if self.grouped:
                samples, channels, *rest = self.value.shape
                x = self._call(aten.view.default, x, [1, samples * channels, *rest])
                arguments[1] = arguments[1] * samples  # type: ignore[operator]
            norm = self._call(self.node.target, x, arguments[1], weight, bias, *arguments[4:])
            if self.grouped:
                norm = self._call(aten.view.default, norm, list(self.value.shape))
        if kind_of(norm) != kind_of(self.end):  # what follows may be a view of that layout
            return
        self.end.replace_all_uses_with(norm)

    def _folded(self, weight: Any, bias: Any) -> tuple[Any, Any]:
        """The norm's own weight and bias after all operations."""
        w, b = weight, bias
        for kind, row in self.operations:
            row = self._call(aten.view.default, row, [-1, *self.channels[-1:]] if self.batched else list(self.channels))
            if kind == "shift":
                b = row if b is None else self._call(aten.add.Tensor, b, row)
            elif kind == "scale":
                w = row if w is None else self._call(aten.mul.Tensor, w, row)
                b = None if b is None else self._call(aten.mul.Tensor, b, row)
            else:
                w = self._call(aten.add.Scalar, row, 1) if w is None else self._call(aten.addcmul.default, w, w, row)
                b = None if b is None else self._call(aten.addcmul.default, b, b, row)
        return w, b

    def _flat(self, row: Any) -> Any:
        """A row in the shape that the norm takes."""
        if row is None or not self.grouped:
            return row
        if tuple(value_of(row).shape) != self.channels:  # the norm's own, the same for all samples
            row = self._call(aten.expand.default, row, list(self.channels))
        return self._call(aten.reshape.default, row, [math.prod(self.channels)])

    def _call(self, target: Any, *args: Any) -> fx.Node:
        return add_call(self.graph, target, *args)
