"""Sums of a block's output and its input, with their gates, and the norms after them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from agd_fast import ops
from agd_fast.graph.capture import arguments_of, schema_name, value_of
from agd_fast.graph.fusing import Fusing, row_and_rest


def fuse_residuals(fusing: Fusing) -> None:
    """Fuse residual + gate·y with its layer norm, where that is the first to use the sum; else the sum alone, if it is gated."""
    for node in fusing.nodes:
        if (found := sum_of(node)) is not None:
            residual, y, gate = found
            norm = min(node.users, default=None)
            joins = norm is not None and is_layer_norm(norm) and norm.args[0] is node and norm not in fusing.written
            if joins and _with_norm(fusing, node, norm, residual, y, gate):  # type: ignore[arg-type]
                continue
            if gate is not None:
                args = (residual, y, fusing.row(gate, node))
                if fusing.takes(ops.gated_residual, *args):
                    node.replace_all_uses_with(fusing.put(ops.gated_residual, *args, before=node)[0])


def _with_norm(fusing: Fusing, node: fx.Node, norm: fx.Node, residual: fx.Node, y: fx.Node, gate: Any) -> bool:
    gamma, beta, eps = rows_of_norm(fusing, norm)
    args = (residual, y, fusing.row(gate, norm), gamma, beta, eps)
    if not fusing.takes(ops.residual_norm, *args):
        return False
    h, normed = fusing.put(ops.residual_norm, *args, before=norm)
    node.replace_all_uses_with(h)
    norm.replace_all_uses_with(normed)
    return True


def sum_of(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """(residual, y, gate) of residual + gate·y [B, ..., C]; the gate is None where there is none."""
    if schema_name(node) != "aten::add" or len(node.args) != 2 or node.kwargs:
        return None
    like = value_of(node)
    pieces = node.args
    if (
        like.ndim < 3
        or not like.is_contiguous()
        or not all(isinstance(one, fx.Node) and _is_like(value_of(one), like) for one in pieces)
    ):
        return None
    for y, residual in (pieces, pieces[::-1]):
        if len(y.users) == 1 and (found := row_and_rest(y)) is not None:  # type: ignore[union-attr, arg-type]
            gate, inner = found
            return residual, inner, gate  # type: ignore[return-value]
    y, residual = pieces
    return residual, y, None  # type: ignore[return-value]


def _is_like(value: Any, like: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == like.shape and value.dtype == like.dtype


def is_layer_norm(node: fx.Node) -> bool:
    """Whether it is a layer norm of the last dimension, plain or with rows per sample."""
    if node.target is ops.ada_layer_norm.overload:
        return True
    return schema_name(node) == "aten::layer_norm" and not node.kwargs and len(node.args[1]) == 1  # type: ignore[arg-type]


def rows_of_norm(fusing: Fusing, norm: fx.Node) -> tuple[Any, Any, float]:
    """γ, β [B or 1, C] and ε."""
    if norm.target is ops.ada_layer_norm.overload:
        _, gamma, beta, eps = arguments_of(norm, None, None, None, 1e-5)
        return gamma, beta, eps
    _, _, gamma, beta, eps, *_ = arguments_of(norm, None, None, None, None, 1e-5)
    return fusing.row(gamma, norm), fusing.row(beta, norm), eps
