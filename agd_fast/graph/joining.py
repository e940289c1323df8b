"""Sets of tokens of which only a few change with the step, such as keys and values of (ω, t, c): all of the same shapes are
joined at once.

Stored whole in tables, all their tokens would be repeated for every step; joined one by one, each set costs a launch per step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from agd_fast.graph.capture import add_call, schema_name, sort, value_of
from agd_fast.graph.levels import Level, elements, in_place_groups

aten = torch.ops.aten


def join_equal_cats(graph: fx.Graph, level: Mapping[fx.Node, Level]) -> frozenset[fx.Node]:
    """Replace `cat`s that mix static tensors with smaller ones of the step by one `cat` for all of the same shapes.

    Returns the nodes that belong in the step itself. A graph that writes in place is left as it is, because order matters there.
    """
    if in_place_groups(graph):
        return frozenset()
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if _mixes(node, level):
            alike.setdefault(_signature(node, level), []).append(node)
    return frozenset(node for nodes in alike.values() for node in _joined(graph, nodes))


def _mixes(node: fx.Node, level: Mapping[fx.Node, Level]) -> bool:
    if schema_name(node) != "aten::cat" or level[node] != Level.STEP:
        return False
    static = sum(elements(piece) for piece in _pieces(node) if level[piece] == Level.STATIC)
    return 2 * static > elements(node)


def _pieces(node: fx.Node) -> list[fx.Node]:
    return list(node.args[0])  # type: ignore[arg-type]


def _signature(node: fx.Node, level: Mapping[fx.Node, Level]) -> Any:
    values = [(tuple(value_of(piece).shape), value_of(piece).dtype, level[piece]) for piece in _pieces(node)]
    return _dim(node), tuple(values), value_of(node).device


def _dim(node: fx.Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    assert isinstance(dim, int)
    return dim % value_of(node).ndim


def _joined(graph: fx.Graph, nodes: list[fx.Node]) -> list[fx.Node]:
    """`nodes`, or the one `cat` [n, …] that replaces them, of the stacked pieces of all."""
    if len(nodes) == 1 or _depend_on_one_another(nodes):
        return nodes
    last = nodes[-1]  # the pieces of all stand before it
    stacks = []
    with graph.inserting_before(last):
        for pieces in zip(*map(_pieces, nodes), strict=True):
            stacks.append(add_call(graph, aten.stack.default, list(pieces)))
        joined = add_call(graph, aten.cat.default, stacks, _dim(last) + 1)
        for index, node in enumerate(nodes):
            own = add_call(graph, aten.select.int, joined, 0, index)
            node.replace_all_uses_with(own)
    sort(graph)
    return [joined]


def _depend_on_one_another(nodes: list[fx.Node]) -> bool:
    behind: set[fx.Node] = set()
    waiting = [user for node in nodes for user in node.users]
    while waiting:
        node = waiting.pop()
        if node not in behind:
            behind.add(node)
            waiting += node.users
    return not behind.isdisjoint(nodes)
