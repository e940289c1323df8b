"""F.layer_norm with a frozen affine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.handlers._norms import Rows, normalised
from agd_fast.memory.interception import Run


def layer_norm(
    run: Run,
    call: Callable[[], Tensor],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """input: [..., *normalized_shape]."""
    if not run.replaces(input, weight, bias):
        return call()
    shape = tuple(normalized_shape)
    norm = partial(_norm, shape=shape, eps=eps)
    length = math.prod(shape)
    rows = Rows(input.numel() // length // len(input) if input.ndim > len(shape) else 1)
    own = partial(_input_gradient, shape=shape, eps=eps)
    return normalised(run, "layer_norm", call, norm, input, weight, bias, rows, length, eps, input_gradient=own)


def _norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float) -> Tensor:
    return F.layer_norm(input, shape, weight, bias, eps)


def _input_gradient(
    gradient: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, *, shape: tuple[int, ...], eps: float
) -> Tensor:
    """The input's gradient, as autograd computes it."""
    _, mean, rstd = torch.native_layer_norm(input, shape, weight, bias, eps)
    needs = (True, False, False)
    return torch.ops.aten.native_layer_norm_backward.default(gradient, input, shape, mean, rstd, weight, bias, needs)[0]
