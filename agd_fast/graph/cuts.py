"""Where a graph may be cut into pieces that are compiled one by one.

Only directly before or after what compilers leave to libraries (products, attention, our kernels): what goes in and comes out
of these is in memory anyway, and nothing is fused across them. Convolutions do not count: compilers choose the memory layout of
their images, which a cut would undo.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from torch import Tensor, fx

from agd_fast.graph.capture import schema_name, value_of
from agd_fast.graph.levels import writes

_PRODUCTS = ("linear", "mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "matmul")
_LIBRARIES = (*(f"aten::{name}" for name in _PRODUCTS), "aten::scaled_dot_product_attention")
_OURS = "agd_fast_kernels::"


def cuts_of(nodes: Sequence[fx.Node], owners: Mapping[fx.Node, fx.Node]) -> list[int]:
    """Where to cut: indices of nodes, each for the place before that node. owners: the node whose memory each is a view of."""
    closed = [0] * (len(nodes) + 1)
    for first, last in _spans(nodes, owners):
        closed[first + 1] += 1
        closed[last + 1] -= 1
    spans = list(accumulate(closed))  # the number of them that each place lies in
    beside = [any(map(_is_left_to_library, nodes[max(index - 1, 0) : index + 1])) for index in range(len(nodes))]
    return [index for index in range(1, len(nodes)) if beside[index] and not spans[index]]


def _spans(nodes: Sequence[fx.Node], owners: Mapping[fx.Node, fx.Node]) -> Iterator[tuple[int, int]]:
    """First and last nodes of what must stay together: all that uses memory that is written to; lists and numbers with all that
    uses them."""
    place = {node: index for index, node in enumerate(nodes)}
    written = {owners[node] for node in nodes if writes(node)}
    together: dict[fx.Node, list[int]] = defaultdict(list)
    for node in nodes:
        for one in {owners[other] for other in (node, *node.all_input_nodes)} & written:
            together[one].append(place[node])
        if not isinstance(value_of(node), Tensor):
            together[node] += [place[node], *(place[user] for user in node.users if user in place)]
    for places in together.values():
        yield min(places), max(places)


def _is_left_to_library(node: fx.Node) -> bool:
    name = schema_name(node)
    return name in _LIBRARIES or name.startswith(_OURS)
