"""What adapters do at a site, merged into the projections and norms of the block that it is at."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from agd_fast import ops
from agd_fast.graph.capture import arguments_of, value_of
from agd_fast.graph.fusing import Fusing, is_plain_linear, linear_arguments, only_user, row_and_rest
from agd_fast.graph.residuals import is_layer_norm, rows_of_norm, sum_of
from agd_fast.ops.norm_scores import MAX_SCORES

_gated_lora = ops.OPS["gated_lora"]


def fuse_adapters(fusing: Fusing) -> None:
    for node in fusing.nodes:
        if node.target is torch.ops.agd_fast.gated_lora.default:
            if not value_of(node).is_contiguous() or not fusing.takes(_gated_lora, *node.args):
                continue
            node.replace_all_uses_with(fusing.put(_gated_lora, *node.args, before=node)[0])
        elif node.target is torch.ops.agd_fast.absorbed_attention.default:
            _fuse_attention(fusing, node)


def _fuse_attention(fusing: Fusing, node: fx.Node) -> None:
    """The scores beside the norm of the block's input, or beside its projection; the mix beside the block's output."""
    hidden, output, A, U, score_bias, heads = arguments_of(node, None, None, None, None, None, 1)
    end, residual, gate = _ending(fusing, node)
    few = value_of(A).shape[1] <= MAX_SCORES and _all_before(hidden, A, score_bias)
    if is_layer_norm(hidden) and residual is not None and few and fusing.written.isdisjoint([hidden, end]):
        gamma, beta, eps = rows_of_norm(fusing, hidden)
        normed_by: tuple[Any, ...] = (hidden.args[0], gamma, beta, A, score_bias, eps, heads)
        if fusing.takes(ops.norm_scores, *normed_by):
            normed, P = fusing.put(ops.norm_scores, *normed_by, before=hidden)
            sum_by = (residual, output, gate, P, U)
            if fusing.takes(ops.gated_residual, *sum_by):
                end.replace_all_uses_with(fusing.put(ops.gated_residual, *sum_by, before=end)[0])
                hidden.replace_all_uses_with(normed)
                return
    projections = (user for user in hidden.users if is_plain_linear(user) and user.args[0] is hidden)
    projection = next((user for user in projections if user is not output), None)
    in_order = projection is not None and projection < end and _all_before(projection, A, score_bias)
    in_order = in_order and fusing.written.isdisjoint([projection, end])
    if projection is None or not in_order or not is_plain_linear(output) or only_user(output) is not node:
        fusing.left["projection_scores", "no plain projection at the block's input or output"] += 1
        return
    projected_by = (*linear_arguments(projection), A, score_bias, heads)
    if fusing.takes(ops.projection_scores, *projected_by):
        q, P = fusing.put(ops.projection_scores, *projected_by, before=projection)
        mixed_by = (*linear_arguments(output), P, U, residual, gate)
        if fusing.takes(ops.projection_mix, *mixed_by):
            end.replace_all_uses_with(fusing.put(ops.projection_mix, *mixed_by, before=end)[0])
            projection.replace_all_uses_with(q)


def _all_before(node: fx.Node, *others: Any) -> bool:
    return all(other < node for other in others if other is not None)


def _ending(fusing: Fusing, node: fx.Node) -> tuple[fx.Node, fx.Node | None, Any]:
    """The last operation that the mix can take with it, the residual that is added there, and the gate [B or 1, C]."""
    user = only_user(node)
    gated = None if user is None else row_and_rest(user)
    end = only_user(user) if user is not None and gated is not None and gated[1] is node else user
    found = None if end is None else sum_of(end)
    if end is None or found is None:
        return node, None, None
    residual, y, gate = found
    if gate is None and residual is node:  # either may be the residual
        residual, y = y, residual
    return (end, residual, fusing.row(gate, end)) if y is node else (node, None, None)
