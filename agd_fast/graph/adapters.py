"""What adapters do at a site, fused with the projections and norms of the block around it."""

from __future__ import annotations

from typing import Any

import torch
from agd_fast_kernels.shapes import MAX_SCORES
from torch import fx

from agd_fast import ops
from agd_fast.graph.capture import arguments_of, value_of
from agd_fast.graph.fusing import Fusing, is_plain_linear, linear_arguments, only_user, row_and_rest
from agd_fast.graph.residuals import is_layer_norm, rows_of_norm, sum_of

_gated_lora = ops.OPS["gated_lora"]


def fuse_adapters(fusing: Fusing) -> None:
    for node in fusing.nodes:
        if node.target is torch.ops.agd_fast.gated_lora.default:
            if fusing.takes(_gated_lora, *node.args):
                fusing.replaces(_gated_lora, node, fusing.put(_gated_lora, *node.args, before=node)[0])
        elif node.target is torch.ops.agd_fast.absorbed_attention.default:
            _fuse_attention(fusing, node)


def _fuse_attention(fusing: Fusing, node: fx.Node) -> None:
    """Compute the scores with the norm of the block's input, or with its projection, and the mix with the block's output."""
    site = _Site(fusing, node)
    if not site.beside_norm() and not site.beside_projections() and not site.asked:
        fusing.left["projection_scores", "no plain projection at the block's input or output"] += 1


class _Site:
    """An absorbed attention in its block. end: the last operation that the mix can include; residual: what is added there; gate:
    [B or 1, C] or None. asked: whether there are projections that a kernel could take it with."""

    def __init__(self, fusing: Fusing, node: fx.Node) -> None:
        self.fusing, self.node, self.asked = fusing, node, False
        self.hidden, self.output, *scored = arguments_of(node, None, None, None, None, None, 1)
        self.A, self.U, self.score_bias, self.heads = scored
        self.end, self.residual, self.gate = _ending(fusing, node)

    def beside_norm(self) -> bool:
        """Fuse it with the norm that begins the block and the sum that ends it: few scores need no product of their own."""
        norm, few = self.hidden, value_of(self.A).shape[1] <= MAX_SCORES["norm_scores"]
        if not few or not is_layer_norm(norm) or self.residual is None or not self._is_clear(norm):
            return False
        gamma, beta, eps = rows_of_norm(self.fusing, norm)
        args = (norm.args[0], gamma, beta, self.A, self.score_bias, eps, self.heads)
        if not self.fusing.takes(ops.norm_scores, *args):
            return False
        normed, P = self.fusing.put(ops.norm_scores, *args, before=norm)
        return self._mixes(ops.gated_residual, (self.residual, self.output, self.gate, P, self.U), norm, normed)

    def beside_projections(self) -> bool:
        projection = next((user for user in self.hidden.users if self._is_projection(user)), None)
        if projection is None or not is_plain_linear(self.output) or only_user(self.output) is not self.node:
            return False
        self.asked = True
        args = (*linear_arguments(projection), self.A, self.score_bias, self.heads)
        if not self.fusing.takes(ops.projection_scores, *args):
            return False
        q, P = self.fusing.put(ops.projection_scores, *args, before=projection)
        mixed_by = (*linear_arguments(self.output), P, self.U, self.residual, self.gate)
        return self._mixes(ops.projection_mix, mixed_by, projection, q)

    def _is_projection(self, user: fx.Node) -> bool:
        """Whether it is a projection of the block's input, before the mix."""
        own = is_plain_linear(user) and user.args[0] is self.hidden and user is not self.output
        return own and user < self.end and self._is_clear(user)

    def _is_clear(self, beside: fx.Node) -> bool:
        """Whether the scores can be computed there, and neither that nor the end is written in place, as others may read that."""
        made = all(one < beside for one in (self.A, self.score_bias) if one is not None)
        return made and self.fusing.written.isdisjoint([beside, self.end])

    def _mixes(self, op: ops.Op, args: tuple[Any, ...], beside: fx.Node, result: fx.Node) -> bool:
        """Put the mix in place of the end, and `result` in place of `beside`; what is then unused is removed later."""
        if not self.fusing.takes(op, *args):
            return False
        self.end.replace_all_uses_with(self.fusing.put(op, *args, before=self.end)[0])
        beside.replace_all_uses_with(result)
        return True


def _ending(fusing: Fusing, node: fx.Node) -> tuple[fx.Node, fx.Node | None, Any]:
    """The last operation that the mix can include, the residual that is added there, and the gate [B or 1, C]."""
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
