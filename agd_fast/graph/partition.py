"""A captured forward cut in three: what is computed once, what is computed once a step of the schedule, and the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from agd_fast.graph.levels import Level, in_place_groups, is_view, levels_of


@dataclass(frozen=True)
class Part:
    """A piece of the forward. arguments, results: nodes of the captured graph."""

    module: fx.GraphModule
    arguments: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is computed."""
        return all(node.op != "call_function" for node in self.module.graph.nodes)

    def __call__(self, values: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        """Its results from the values of nodes."""
        return self.module.forward(*[values[node] for node in self.arguments])


@dataclass(frozen=True)
class Parts:
    """once: computes what does not change. step: what depends on the step alone. views: further views of the memory of `step`'s
    results. body: the rest of the forward, from all of these."""

    once: Part
    step: Part
    views: Part
    body: Part


def partition(
    graph: fx.Graph,
    placeholders: Mapping[fx.Node, Level],
    kept: frozenset[fx.Node] = frozenset(),
    elsewhere: frozenset[fx.Node] = frozenset(),
) -> Parts:
    """placeholders: the levels of the inputs. kept: nodes that stay in the body, whatever they depend on. elsewhere: those that
    no part computes; the body takes them, and what they are computed from is among the results of the other parts."""
    level = levels_of(graph, placeholders)
    for node in kept | elsewhere:
        level[node] = Level.MOVING
    for node in graph.nodes:  # and what is computed from them
        level[node] = max([level[node], *(level[one] for one in node.all_input_nodes)])
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    written = in_place_groups(graph)
    output = next(node for node in graph.nodes if node.op == "output")

    def at(which: Level) -> list[fx.Node]:
        return [node for node in nodes if level[node] == which]

    def leaving(which: Level) -> list[fx.Node]:
        """Nodes of a level whose tensors are needed above it."""
        found = [node for node in at(which) if any(level[user] > which for user in node.users)]
        return _tensors(found)

    static, rows = leaving(Level.STATIC), leaving(Level.STEP)
    aliases = [node for node in rows if is_view(node) and node not in written and _can_be_a_row(_owner(node))]
    chain = _view_chain(aliases)
    stored = _tensors([*(node for node in rows if node not in aliases), *(_owner(node) for node in aliases)])
    return Parts(
        once=part_of(at(Level.STATIC), static),
        step=part_of(at(Level.STEP), stored),
        views=part_of(chain, aliases),
        body=part_of([node for node in at(Level.MOVING) if node not in elsewhere], list(output.args[0])),
    )


def _tensors(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that are tensors, once each; those that are lists are left out, as their items are nodes of their own."""
    return [node for node in dict.fromkeys(nodes) if isinstance(node.meta.get("val"), Tensor)]


def _owner(node: fx.Node) -> fx.Node:
    """What a node is a view of, or the node itself."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def _can_be_a_row(node: fx.Node) -> bool:
    """Whether views of it can be views of its copy in a row too, which is contiguous."""
    value = node.meta.get("val")
    return node.op != "placeholder" and isinstance(value, Tensor) and value.is_contiguous()


def _view_chain(aliases: list[fx.Node]) -> list[fx.Node]:
    """All views on the way from their owners to `aliases`, in the order of the graph."""
    chain: set[fx.Node] = set()
    for node in aliases:
        while is_view(node):
            chain.add(node)
            node = node.all_input_nodes[0]
    return [node for node in (aliases[0].graph.nodes if aliases else ()) if node in chain]


def part_of(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> Part:
    """`nodes` as a function of what they take from elsewhere, in the order in which they take it."""
    inner = fx.Graph()
    own = set(nodes)
    needed = [one for node in nodes for one in node.all_input_nodes if one not in own]
    arguments = tuple(dict.fromkeys([*needed, *(node for node in results if node not in own)]))
    copies: dict[fx.Node, fx.Node] = {}
    for node in arguments:
        copies[node] = inner.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = inner.node_copy(node, copies.__getitem__)
    inner.output([copies[node] for node in results])
    inner.eliminate_dead_code()
    return Part(fx.GraphModule({}, inner), arguments, tuple(results))
