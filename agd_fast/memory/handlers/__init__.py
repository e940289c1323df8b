"""Handlers of the torch functions that keep much for backward: one op per file, and the table that maps functions to them.

A handler is called with the run, the call that was made, and its arguments; it returns what the call returns, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.handlers.activations import gelu, relu, sigmoid, silu, tanh
from agd_fast.memory.handlers.addcmul import addcmul
from agd_fast.memory.handlers.assemble import empty_like, write
from agd_fast.memory.handlers.attention import scaled_dot_product_attention
from agd_fast.memory.handlers.bmm import baddbmm, matmul
from agd_fast.memory.handlers.cast import cast
from agd_fast.memory.handlers.conv import convolution
from agd_fast.memory.handlers.div import div
from agd_fast.memory.handlers.follow import elementwise, joined
from agd_fast.memory.handlers.group_norm import group_norm
from agd_fast.memory.handlers.layer_norm import layer_norm
from agd_fast.memory.handlers.linear import linear
from agd_fast.memory.handlers.mul import mul
from agd_fast.memory.handlers.power import power
from agd_fast.memory.handlers.rms_norm import rms_norm

HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    F.layer_norm: layer_norm,
    torch.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    torch.rms_norm: rms_norm,
    F.group_norm: group_norm,
    torch.group_norm: group_norm,
    F.silu: silu,
    F.gelu: gelu,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, F.sigmoid), sigmoid),
    **dict.fromkeys((torch.tanh, Tensor.tanh, F.tanh), tanh),
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu), relu),
    **dict.fromkeys((torch.mul, Tensor.mul, torch.multiply, Tensor.multiply), mul),
    **dict.fromkeys((torch.div, Tensor.div, torch.true_divide, Tensor.true_divide), div),
    **dict.fromkeys((torch.add, Tensor.add, torch.sub, Tensor.sub, torch.neg, Tensor.neg), elementwise),
    torch.empty_like: empty_like,
    Tensor.__setitem__: write,
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), joined),
    **dict.fromkeys((torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul), matmul),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), baddbmm),
    **dict.fromkeys((torch.addcmul, Tensor.addcmul), addcmul),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__, torch.square, Tensor.square), power),
    **dict.fromkeys((Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double), cast),
    **{
        function: convolution(function)
        for function in (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
}
