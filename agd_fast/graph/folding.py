"""Operations that need not run: those that change nothing, those that run twice, and rows that a norm can take as its own.

A norm followed by a scale and a shift that do not depend on x_t (adaLN, and modulation adapters on norms) is a norm with
another γ and β. PyTorch's layer norms have one γ for all samples, so rows are folded into them if they are the same for all
samples, as in a batch of one; into group norms if the input is one sample or contiguous. Our own norms have one γ per sample,
and can include the SiLU.
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
    """Remove operations that change nothing, and those that run twice."""
    written, seen = in_place_groups(graph), _Seen(graph)
    _drop_identities(graph, written, seen)
    _share_equals(graph, written, seen)


def _drop_identities(graph: fx.Graph, written: set[fx.Node], seen: _Seen) -> None:
    """Replace x / 1, x · 1, x + 0, x − 0, and casts and dropout that do nothing by x, if dtype and layout are the same."""
    for node in list(graph.nodes):
        if not (_is_neutral(node) or schema_name(node) in _CASTS) or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        x = node.args[0]  # if x or the node is written in place, the node may be a copy that is needed
        if written.isdisjoint([node, x]) and kind_of(x) == kind_of(node) and not is_random(node):
            seen.replace(node, x)


def _is_neutral(node: fx.Node) -> bool:
    neutral = _NEUTRAL.get(schema_name(node))
    if neutral is None or len(node.args) != 2 or node.kwargs or isinstance(node.args[1], fx.Node):
        return False
    return bool(node.args[1] == neutral)


def _share_equals(graph: fx.Graph, written: set[fx.Node], seen: _Seen) -> None:
    """Merge equal operations on the same arguments: each of DiT's blocks, for example, computes the sines of t itself."""
    found: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or is_random(node) or not written.isdisjoint([node, *node.all_input_nodes]):
            continue  # reads before and after a write are not the same
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        if found.setdefault(key, node) is not node:
            seen.replace(node, found[key])


class _Seen:
    """Memory that a caller sees: of its arguments and of the results. It may write to any of these, so no two may become one."""

    def __init__(self, graph: fx.Graph) -> None:
        nodes = [node for node in graph.nodes if node.op == "placeholder"] + graph.output_node().all_input_nodes
        self.memories = set[int]().union(*map(memories_of, nodes))
        self.became: dict[int, set[int]] = {}  # by memory, all memory that is one with it now

    def replace(self, node: fx.Node, other: fx.Node) -> None:
        """Put `other` in the place of a node, unless a caller would notice."""
        own, its = self._of(node), self._of(other)
        if own != its and own & self.memories and its & self.memories:
            return
        self.became |= dict.fromkeys(own | its, own | its)
        node.replace_all_uses_with(other)
        node.graph.erase_node(node)

    def _of(self, node: fx.Node) -> set[int]:
        return set[int]().union(*(self.became.get(memory, {memory}) for memory in memories_of(node)))


def _hashable(value: Any) -> Any:
    """A hashable form. Constants come with their types: 1, 1.0 and True are not the same argument."""
    if isinstance(value, Mapping):
        return tuple((name, _hashable(inner)) for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def fold_into_norms(graph: fx.Graph, level: Mapping[fx.Node, Level], fusing: Fusing | None = None) -> None:
    """level: that of each node. fusing: given where norms may be put on kernels."""
    written = in_place_groups(graph)
    for node in list(graph.nodes):
        if schema_name(node) in _NORMS and level[node] == Level.MOVING and not written.intersection(node.all_input_nodes):
            _Norm(graph, node, fusing, written).fold()


class _Norm:
    """A norm, and the operations after it that scale and shift it by rows: ("scale", γ), ("one_plus", δ) or ("shift", β).

    Nothing else uses the norm or the results between these operations, so no row can depend on the norm.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, fusing: Fusing | None, written: set[fx.Node]) -> None:
        self.graph, self.node, self.fusing, self.written = graph, node, fusing, written
        self.value: Tensor = value_of(node)
        self.grouped = schema_name(node) == "aten::group_norm"
        self.end = node  # the last operation that is folded
        self.operations: list[tuple[str, fx.Node]] = []

    def fold(self) -> None:
        while self._takes(list(self.end.users)):
            pass
        if self.end in self.written:  # and so would be what takes its place
            return
        if self._on_kernel():
            return
        if self.operations and self._in_torch():
            self._replace()

    def _in_torch(self) -> bool:
        """Whether PyTorch's own norm can take the rows."""
        own = [value_of(one) for one in self.node.args[2:4] if isinstance(one, fx.Node)]
        if any(one.dtype != self.value.dtype for one in own):  # γ and β must have one dtype
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
        """Whether one of our norms takes its place: a group norm with a SiLU after it, a layer norm with rows per sample."""
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
        """Whether it has exactly one number per channel of the norm, and is broadcast over everything else."""
        if not isinstance(node, fx.Node) or node in self.written:  # it would be read later than now
            return False
        value = value_of(node)
        if not isinstance(value, Tensor) or value.dtype != self.value.dtype or value.ndim > self.value.ndim:
            return False
        ones = (1,) * (self.value.ndim - len(self.channels))
        expected = (*self.channels, *ones) if self.grouped else (*ones, *self.channels)
        shape = (1,) * (self.value.ndim - value.ndim) + tuple(value.shape)
        batched = (self.value.shape[0], *expected[1:])  # a row for each sample, which only our kernels take
        return shape == expected or (not self.grouped and self.fusing is not None and len(ones) > 0 and shape == batched)

    def _takes(self, users: list[fx.Node]) -> bool:
        """Whether what follows can be folded too; if so, it is."""
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
        """The same for n + addcmul(β, n, γ)."""
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
        if kind_of(norm) != kind_of(self.end):  # what follows may be a view that needs that layout
            return
        self.end.replace_all_uses_with(norm)

    def _folded(self, weight: Any, bias: Any) -> tuple[Any, Any]:
        """The norm's weight and bias with all operations folded into them."""
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
