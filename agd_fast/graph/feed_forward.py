"""Projections followed by an activation."""

from __future__ import annotations

import operator

import torch
from torch import fx

from agd_fast import ops
from agd_fast.graph.capture import add_call, arguments_of, kind_of, schema_name, value_of
from agd_fast.graph.fusing import Fusing, is_plain_linear, linear_arguments, only_user

aten = torch.ops.aten

_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def fuse_feed_forward(fusing: Fusing) -> None:
    """Fuse a projection and its gelu, or a·gelu(g) of its two halves, into one product."""
    for node in fusing.nodes:
        found = _geglu(node) or _gelu(node)
        if found is None:
            continue
        linear, activation = found
        args = (*linear_arguments(linear), activation)
        if fusing.takes(ops.activated_linear, *args):
            node.replace_all_uses_with(fusing.put(ops.activated_linear, *args, before=node)[0])


def end_products_with_gelu(fusing: Fusing, policy: ops.Kernels) -> int:
    """Replace projections and their gelu by the product of a library that ends with it. Returns how many."""
    count = 0
    for node in fusing.nodes:
        found = _gelu(node)
        if found is not None and _is_read_as_it_is(fusing, found[0]):
            count += _ends_with_gelu(fusing, node, found[0], policy)
    return count


def _is_read_as_it_is(fusing: Fusing, linear: fx.Node) -> bool:
    """Whether the projection may move to its gelu: nothing that it reads or gives is written in place."""
    return fusing.written.isdisjoint([linear, *linear.all_input_nodes])


def _ends_with_gelu(fusing: Fusing, node: fx.Node, linear: fx.Node, policy: ops.Kernels) -> bool:
    graph, (x, weight, bias) = fusing.graph, linear_arguments(linear)
    if bias is None or value_of(bias).ndim != 1:
        return False
    with graph.inserting_before(node):
        rows = add_call(graph, aten.reshape.default, x, [-1, value_of(x).shape[-1]])
        approximate = str(node.kwargs.get("approximate", "none"))
        if reason := ops.refusal_of_epilogue(value_of(rows), value_of(weight), value_of(bias), approximate, policy):
            if policy != "never" and value_of(x).is_cuda:
                fusing.left["gelu_epilogue", reason] += 1
            return False
        columns = add_call(graph, aten.t.default, weight)
        product = add_call(graph, aten._addmm_activation.default, bias, rows, columns, use_gelu=True)
        result = add_call(graph, aten.view.default, product, list(value_of(node).shape))
    if kind_of(result) != kind_of(node):  # what follows may be a view that needs that layout
        return False
    node.replace_all_uses_with(result)
    return True


def _gelu(node: fx.Node) -> tuple[fx.Node, str] | None:
    if schema_name(node) != "aten::gelu":
        return None
    linear = node.args[0]
    approximate = node.kwargs.get("approximate", "none")
    if not is_plain_linear(linear) or only_user(linear) is not node or approximate not in _GELUS:  # type: ignore[arg-type]
        return None
    return linear, _GELUS[str(approximate)]  # type: ignore[return-value]


def _geglu(node: fx.Node) -> tuple[fx.Node, str] | None:
    if schema_name(node) != "aten::mul" or len(node.args) != 2:
        return None
    for value, gelu in (node.args, node.args[::-1]):
        if not isinstance(value, fx.Node) or not isinstance(gelu, fx.Node) or schema_name(gelu) != "aten::gelu" or gelu.kwargs:
            continue
        gate = gelu.args[0]
        halves = _half(value, 0), _half(gate, 1)  # type: ignore[arg-type]
        if halves[0] is None or halves[0] is not halves[1] or any(only_user(one) is None for one in (value, gelu, gate)):  # type: ignore[arg-type]
            continue
        linear = halves[0].args[0]
        if is_plain_linear(linear) and only_user(linear) is halves[0] and len(halves[0].users) == 2:  # type: ignore[arg-type]
            return linear, "geglu"  # type: ignore[return-value]
    return None


def _half(node: fx.Node, index: int) -> fx.Node | None:
    """The `chunk` into two along the last dimension of which this is the half at `index`; None if it is not."""
    if node.target is not operator.getitem or node.args[1] != index:
        return None
    chunk = node.args[0]
    if schema_name(chunk) != "aten::chunk" or chunk.kwargs:  # type: ignore[arg-type, union-attr]
        return None
    x, count, dim = arguments_of(chunk, None, None, 0)  # type: ignore[arg-type]
    last = dim in (-1, value_of(x).ndim - 1) and value_of(x).shape[-1] % 2 == 0
    return chunk if count == 2 and last else None  # type: ignore[return-value]
