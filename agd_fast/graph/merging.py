"""Low-rank terms beside a convolution that are the same for all samples, made part of its weight: a term that sees one position
at a time adds to the weight's centre, so it needs no pass over the image."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from agd_fast.graph.capture import add_call, arguments_of, kind_of, schema_name, sort, value_of
from agd_fast.graph.fusing import Fusing, only_user
from agd_fast.graph.levels import Level

CENTRED = torch.ops.agd_fast.centred.default


def merge_low_rank(fusing: Fusing) -> int:
    """Merge terms where neither they nor the weight depend on x_t, and where up·down takes fewer products. Returns how many."""
    merged = sum(_merge(fusing, node) for node in fusing.nodes if node.target is torch.ops.agd_fast.gated_lora.default)
    if merged:
        sort(fusing.graph)  # what a weight needs may be computed after its convolution
    return merged


def _merge(fusing: Fusing, node: fx.Node) -> bool:
    hidden, convolution, down, up, gates, channels_first = arguments_of(node, None, None, None, None, None, False)
    if gates is not None or not channels_first or not _is_beside(node, hidden, convolution) or not _pays(convolution):
        return False
    weight = convolution.args[1]
    parts = (weight, up, down)
    if weight.op != "placeholder" or any(fusing.level[one] == Level.MOVING for one in parts):
        return False
    if any(user.target is CENTRED for user in weight.users):  # a step has one copy of a weight that several share
        return False
    late = not (up < convolution and down < convolution)  # sorting moves the convolution
    if not fusing.written.isdisjoint([convolution, *parts]) or (late and fusing.written):
        return False
    with fusing.graph.inserting_before(convolution):
        convolution.replace_input_with(weight, add_call(fusing.graph, CENTRED, *parts))
    node.replace_all_uses_with(convolution)
    fusing.graph.erase_node(node)
    return True


def _is_beside(node: fx.Node, hidden: fx.Node, convolution: fx.Node) -> bool:
    """Whether the term sees at every position what the centre of the convolution's weight sees there."""
    if schema_name(convolution) != "aten::conv2d" or convolution.kwargs or convolution.args[0] is not hidden:
        return False
    if only_user(convolution) is not node or kind_of(convolution) != kind_of(node):
        return False
    _, weight, _, stride, padding, dilation, groups = arguments_of(convolution, None, None, None, 1, 0, 1, 1)
    kernel = value_of(weight).shape[2:]
    middle = [size // 2 * step for size, step in zip(kernel, _pair(dilation), strict=True)]
    return groups == 1 and _pair(stride) == [1, 1] and _pair(padding) == middle and all(size % 2 for size in kernel)


def _pair(value: int | Sequence[int]) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _pays(convolution: fx.Node) -> bool:
    """Whether up·down takes fewer products than applying down and up at every position."""
    image, weight = map(value_of, convolution.args[:2])  # type: ignore[arg-type]
    channels, inputs = weight.shape[:2]
    return channels * inputs < len(image) * math.prod(image.shape[2:]) * (channels + inputs)
