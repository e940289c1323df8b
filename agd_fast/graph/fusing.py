"""Pieces of a graph put on our kernels: what a pattern finds is offered to `agd_fast.ops`, which takes it or says why not."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.graph.capture import add_call, fake_mode_of, kind_of, kind_of_value, schema_name, value_of
from agd_fast.graph.levels import Level, in_place_groups, is_view
from agd_fast.ops import OPS, Kernels, Op, refusal
from agd_fast.warning import first_line

ELSEWHERE = "its channels do not lie in memory as the kernel expects"


class Fusing:
    """What is done to one graph. level: that of each node; only what depends on x_t is put on kernels. left: how often an op's
    kernel did not take a piece, by op and reason."""

    def __init__(self, graph: fx.Graph, level: Mapping[fx.Node, Level], policy: Kernels) -> None:
        self.graph, self.level, self.policy = graph, level, policy
        self.written = in_place_groups(graph)  # what is read from these depends on when it is read
        self.left: Counter[tuple[str, str]] = Counter()

    @property
    def nodes(self) -> list[fx.Node]:
        """Nodes that may be replaced: none that shares memory with what is written in place, because others may read that."""
        moving = (node for node in self.graph.nodes if self.level.get(node, Level.MOVING) == Level.MOVING)
        return [node for node in moving if node not in self.written]

    def takes(self, op: Op, *args: Any) -> bool:
        """Whether the op's kernel is to run on these nodes."""
        values = fx.node.map_arg(args, value_of)
        nodes = [arg for arg in args if isinstance(arg, fx.Node)]
        if self.written.isdisjoint([*nodes, *(one for node in nodes if is_view(node) for one in node.all_input_nodes)]):
            reason = unfit(op, values) or refusal(op, values, self.policy)
        else:
            reason = "tensors that are written in place"
        if reason and self.policy != "never":
            self.left[op.name, reason] += 1
        return not reason

    def put(self, op: Op, *args: Any, before: fx.Node) -> tuple[fx.Node, ...]:
        """Add a call of the op, and return its outputs. All its arguments must stand before `before`."""
        with self.graph.inserting_before(before):
            node = add_call(self.graph, op.overload, *args)
            found = value_of(node)
            if isinstance(found, Tensor):
                return (node,)
            return tuple(add_call(self.graph, operator.getitem, node, index) for index in range(len(found)))

    def replaces(self, op: Op, node: fx.Node, found: fx.Node) -> bool:
        """Whether an op's output takes the place of a node: if it has the same layout, or if no user of the node minds."""
        fits = kind_of(found) == kind_of(node) or all(_gives_the_same(user, node, found) for user in node.users)
        if fits:
            node.replace_all_uses_with(found)
        else:
            self.graph.erase_node(found)
            self.left[op.name, ELSEWHERE] += 1
        return fits

    def row(self, node: Any, before: fx.Node) -> Any:
        """A row of channels, whatever its dimensions, as [B or 1, C]; None stays None."""
        if node is None:
            return None
        value = value_of(node)
        shape = [value.shape[0] if value.ndim > 1 else 1, value.shape[-1]]
        with self.graph.inserting_before(before):
            return add_call(self.graph, torch.ops.aten.view.default, node, shape)

    def info(self) -> dict[str, dict[str, int]]:
        """For display. kernels: number of pieces on kernels, by op. not_on_kernels: number of others, by op and reason."""
        names = {op.overload: op.name for op in OPS.values()}
        found = Counter(names[node.target] for node in self.graph.nodes if node.target in names)
        return {"kernels": dict(found), "not_on_kernels": {f"{name}: {reason}": n for (name, reason), n in self.left.items()}}


def unfit(op: Op, values: tuple[Any, ...]) -> str:
    """Why the op does not accept these arguments at all, for example γ in another dtype than x; empty where it does."""
    try:
        with fake_mode_of(values):
            op.reference(*values)
    except (ValueError, RuntimeError) as error:
        return first_line(error)
    return ""


def _gives_the_same(user: fx.Node, node: fx.Node, found: fx.Node) -> bool:
    """Whether the result of a node's user keeps its layout when `found` takes the node's place."""
    if user.op != "call_function":
        return False
    args, kwargs = fx.node.map_arg((user.args, user.kwargs), lambda one: value_of(found if one is node else one))
    try:
        with fake_mode_of((args, kwargs)):
            return bool(kind_of_value(user.target(*args, **kwargs)) == kind_of(user))  # type: ignore[operator]
    except (RuntimeError, ValueError):  # a view that this layout does not allow
        return False


def only_user(node: fx.Node) -> fx.Node | None:
    """The one operation that uses it; None where there is none, or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def is_row(node: Any, like: Tensor) -> bool:
    """Whether it has one number per channel of `like` [B, ..., C], for all samples or each, and is broadcast over the rest."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    if (
        not isinstance(value, Tensor)
        or value.dtype != like.dtype
        or value.ndim > like.ndim
        or value.shape[-1:] != like.shape[-1:]
    ):
        return False
    shape = (1,) * (like.ndim - value.ndim) + tuple(value.shape)
    return shape[0] in (1, like.shape[0]) and all(size == 1 for size in shape[1:-1])


def row_and_rest(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(row, x) of a product x·row."""
    if schema_name(node) != "aten::mul" or len(node.args) != 2 or node.kwargs:
        return None
    like = value_of(node)
    for row, rest in (node.args, node.args[::-1]):
        if isinstance(rest, fx.Node) and is_row(row, like) and value_of(rest).shape == like.shape and like.ndim > 2:
            return row, rest  # type: ignore[return-value]
    return None


def is_plain_linear(node: Any) -> bool:
    if not isinstance(node, fx.Node) or schema_name(node) != "aten::linear" or node.kwargs:
        return False
    return value_of(node.args[1]).ndim == 2  # type: ignore[arg-type]


def linear_arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """x, weight and bias."""
    x, weight, *bias = node.args
    return x, weight, (bias[0] if bias else None)  # type: ignore[return-value]
