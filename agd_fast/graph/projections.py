"""Projections of the same tokens, such as queries, keys and values, joined into one product. Thin ones, such as those of
adapters, are joined to a wider one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.graph.capture import add_call, value_of
from agd_fast.graph.fusing import Fusing, is_plain_linear, linear_arguments
from agd_fast.graph.levels import Level, is_view
from agd_fast.ops import refusal_of_join

aten = torch.ops.aten

ALIGNMENT = 16  # bytes
TILE = 128 * 128  # elements of a product that one multiprocessor works on at a time
# How often each of them does so, a choice. Three products of w waves take ⌈w⌉ each, as one product ⌈3w⌉ / 3 each: the larger w,
# the less is gained, while the copies of the weights are as large as ever.
WAVES = 2

# joins weights, and numbers of zeros, along their first dimension, once; gives None where that cannot be done
Concatenate = Callable[[Sequence[fx.Node | int]], fx.Node | None]
Wanted = Callable[[Tensor, int], bool]  # tokens [..., K], rows of the widest weight → whether projections of them are joined


def leaves_card_idle(x: Tensor, rows: int) -> bool:
    """Whether a product of tokens [..., K] with a weight of so many rows takes less than `WAVES` on all multiprocessors: then one
    that is several times as large takes hardly longer."""
    if x.device.type != "cuda":
        return False
    count = torch.cuda.get_device_properties(x.device).multi_processor_count
    return x.numel() // x.shape[-1] * rows < WAVES * TILE * count


def join_projections(fusing: Fusing, concatenate: Concatenate, wanted: Wanted) -> int:
    """Join projections of the same tokens. Returns how many became parts of another."""
    count = 0
    for x in fusing.nodes:
        linears = sorted(user for user in x.users if _is_joinable(fusing, user, x))
        aligned = [linear for linear in linears if _rows(linear) * value_of(x).itemsize % ALIGNMENT == 0]
        if len(aligned) > 1 and wanted(value_of(x), max(map(_rows, aligned))) and _join(fusing, x, aligned, concatenate):
            count += len(aligned) - 1
    return count


def join_thin_projections(fusing: Fusing, concatenate: Concatenate) -> int:
    """Join thin projections, with at most half the rows of a wider one, to that one. Returns how many."""
    count = 0
    for x in fusing.nodes:
        linears = [user for user in x.users if _is_joinable(fusing, user, x)]
        linears.sort(key=lambda node: len(value_of(linear_arguments(node)[1])))
        if len(linears) > 1 and 2 * _rows(linears[0]) <= _rows(linears[1]):
            wide, thin = linears[1], linears[0]
            if _is_aligned(value_of(x), wide, thin) and _is_worth_it(fusing, wide, thin):
                count += _join(fusing, x, [wide, thin], concatenate)
    return count


def _is_aligned(x: Tensor, wide: fx.Node, thin: fx.Node) -> bool:
    """Whether every row of both results begins at an address from which attention kernels can read."""
    return all(rows * x.itemsize % ALIGNMENT == 0 for rows in (_rows(wide), _rows(wide) + _rows(thin)))


def _is_worth_it(fusing: Fusing, wide: fx.Node, thin: fx.Node) -> bool:
    x, weight, _ = linear_arguments(thin)
    reason = refusal_of_join(value_of(x), value_of(weight), value_of(linear_arguments(wide)[1]), fusing.policy)
    if reason:
        fusing.left["joined projections", reason] += 1
    return not reason


def _rows(linear: fx.Node) -> int:
    return len(value_of(linear_arguments(linear)[1]))


def _is_joinable(fusing: Fusing, node: fx.Node, x: fx.Node) -> bool:
    """Whether it is a projection of x with static parameters, whose users accept channels that are a slice of wider rows."""
    if not is_plain_linear(node) or node.args[0] is not x:
        return False
    parameters = [one for one in linear_arguments(node)[1:] if one is not None]
    fixed = all(fusing.level.get(one, Level.MOVING) == Level.STATIC for one in parameters)
    return fixed and fusing.written.isdisjoint([node, x, *parameters]) and all(map(_takes_strides, node.users))


def _takes_strides(user: fx.Node) -> bool:
    """Whether an operation accepts tokens whose channels are a slice of wider rows."""
    if _is_viewed(user):
        return False
    if user.target is aten.view.default:
        shape: Any = user.args[1]
        like = value_of(user.args[0])  # type: ignore[arg-type]
        return tuple(value_of(user).shape[: like.ndim - 1]) == tuple(like.shape[:-1]) and len(shape) >= like.ndim
    return user.target in (aten.linear.default, aten.mul.Tensor, aten.unflatten.int, aten.add.Tensor)


def _is_viewed(node: fx.Node) -> bool:
    """Whether it is a view whose layout a further `view` may depend on."""
    return is_view(node) and any(user.target is aten.view.default or _is_viewed(user) for user in node.users)


def _join(fusing: Fusing, x: fx.Node, linears: list[fx.Node], concatenate: Concatenate) -> bool:
    graph = fusing.graph
    weight = concatenate([linear_arguments(linear)[1] for linear in linears])
    biases = [linear_arguments(linear)[2] or _rows(linear) for linear in linears]
    biased = not all(isinstance(one, int) for one in biases)
    bias = concatenate(biases) if biased else None
    if weight is None or (biased and bias is None):
        return False
    with graph.inserting_before(min(linears)):
        joined = add_call(graph, aten.linear.default, x, weight, bias)
        start = 0
        for linear in linears:
            own = add_call(graph, aten.slice.Tensor, joined, -1, start, start + _rows(linear))
            linear.replace_all_uses_with(own)
            start += _rows(linear)
    return True
