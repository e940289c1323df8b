"""What each operation of a captured forward depends on: nothing that moves, the step of the schedule, or x_t."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from agd_fast.graph.capture import arguments_of, schema_name, value_of

# they give views, or the argument itself, where that is possible, else copies
_MAYBE_COPIES = ("reshape", "reshape_as", "flatten", "ravel", "contiguous", "to", "type_as", "dropout")


class Level(IntEnum):
    """STATIC: the same for a whole run, computed once. STEP: depends on the step alone, once for a schedule. MOVING: the rest."""

    STATIC = 0
    STEP = 1
    MOVING = 2


def levels_of(graph: fx.Graph, placeholders: Mapping[fx.Node, Level]) -> dict[fx.Node, Level]:
    """The level of every node. placeholders: the levels of the inputs; all other placeholders are constants.

    Tensors that are written in place, and all views of them, share one level: the highest of all that is written to them, and of
    all that reads them before the last write.
    """
    owners = owners_of(graph)
    last = {owners[node]: index for index, node in enumerate(graph.nodes) if writes(node)}
    level: dict[fx.Node, Level] = {}
    of_group: dict[fx.Node, Level] = dict.fromkeys(last, Level.STATIC)
    while True:  # until what is written in place has settled
        before = dict(of_group)
        for index, node in enumerate(graph.nodes):
            if node.op == "placeholder":
                level[node] = placeholders.get(node, Level.STATIC)
            else:
                found = [level[one] for one in node.all_input_nodes]
                level[node] = max(found, default=Level.STATIC)
                if node.op == "output" or is_random(node) or (writes(node) and owners[node].op == "placeholder"):
                    level[node] = Level.MOVING  # what a caller sees happens at every step
            if (group := owners[node]) in last:
                of_group[group] = level[node] = max(of_group[group], level[node])
            for group in {owners[one] for one in node.all_input_nodes}:
                if index < last.get(group, -1):
                    of_group[group] = max(of_group[group], level[node])
        if of_group == before:
            return level


def is_view(node: fx.Node) -> bool:
    """Whether the node is a view of its first argument, whatever the layout of that: nothing is computed."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.all_input_nodes or _maybe_copies(node):
        return _is_item(node) and is_view(_first(node))
    aliases = [argument.alias_info for argument in schema.arguments[:1]]
    returned = [value.alias_info for value in schema.returns]
    return bool(aliases and aliases[0] is not None and not aliases[0].is_write and any(returned))


def in_place_groups(graph: fx.Graph) -> set[fx.Node]:
    """All nodes that share memory with something that is written in place."""
    owners = owners_of(graph)
    written = {owners[node] for node in graph.nodes if writes(node)}
    return {node for node in owners if owners[node] in written}


def leading_to(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """These nodes, at least one, and all that they are computed from, in the order of their graph."""
    found, waiting = set(nodes), list(nodes)
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return [node for node in nodes[0].graph.nodes if node in found]


def elements(node: fx.Node) -> int:
    value = value_of(node)
    return value.numel() if isinstance(value, Tensor) else 0


def owners_of(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node whose memory each node is a view of; one for all memory that a single operation writes to or gives views of."""
    owners: dict[fx.Node, fx.Node] = {}
    first_in: dict[int, fx.Node] = {}  # by memory
    for node in graph.nodes:
        memories = memories_of(node)
        sharing = [*_sharing(node), *(first_in[memory] for memory in memories if memory in first_in)]
        found = {owners[one] for one in sharing}
        owners[node] = min(found, default=node)  # an input, where one is among them
        if len(found) > 1:
            owners = {one: owners[node] if owner in found else owner for one, owner in owners.items()}
        for memory in memories:
            first_in.setdefault(memory, node)
    return owners


def memories_of(node: fx.Node) -> set[int]:
    """The storages of its tensors: two nodes have one in common where one is a view of the other."""
    values = [one for one in pytree.tree_leaves(value_of(node)) if isinstance(one, Tensor) and one.layout == torch.strided]
    return {value.untyped_storage()._cdata for value in values}


def _sharing(node: fx.Node) -> list[fx.Node]:
    """The nodes that it writes to, or may be a view of."""
    if writes(node):
        return _written(node)
    shares = node.op == "call_function" and node.all_input_nodes and (is_view(node) or _maybe_copies(node) or _is_item(node))
    return [_first(node)] if shares else []


def _written(node: fx.Node) -> list[fx.Node]:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    given = {**{argument.name: value for argument, value in zip(arguments, node.args, strict=False)}, **node.kwargs}
    targets = [given.get(argument.name) for argument in arguments if argument.alias_info is not None and argument.is_write]
    return [one for one in pytree.tree_leaves(targets) if isinstance(one, fx.Node)]


def _maybe_copies(node: fx.Node) -> bool:
    return schema_name(node).removeprefix("aten::") in _MAYBE_COPIES


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def _first(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether it draws random numbers."""
    name = schema_name(node)
    if name == "aten::dropout":
        return bool(node.args[2])
    if name == "aten::scaled_dot_product_attention":
        return bool(arguments_of(node, None, None, None, None, 0.0)[4] or node.kwargs.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
