"""The part of a convolution's backward that does not need its input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def input_gradient(
    dy: Tensor,
    size: Sequence[int],
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    transposed: bool = False,
    output_padding: Sequence[int] | None = None,
) -> Tensor:
    """dx of shape `size`, [B, C, ...] or [C, ...]; like torch.nn.grad, but also unbatched and transposed."""
    alone = len(size) == len(stride) + 1
    dy = dy.unsqueeze(0) if alone else dy
    like = dy.new_empty(1).expand((1, *size) if alone else size)  # only its shape is read
    args = (None, stride, padding, dilation, transposed, output_padding or [0] * len(stride), groups, (True, False, False))
    dx = torch.ops.aten.convolution_backward(dy, like, weight, *args)[0]
    return dx.squeeze(0) if alone else dx
