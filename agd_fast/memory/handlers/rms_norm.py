"""F.rms_norm with a frozen weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.handlers._norms import Rows, normalised
from agd_fast.memory.interception import Run


def rms_norm(
    run: Run,
    call: Callable[[], Tensor],
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """input: [..., *normalized_shape]."""
    if not run.replaces(input, weight) or (eps is None and input.itemsize < 4):  # its dtype's eps or float32's, by torch version
        return call()
    shape = tuple(normalized_shape)
    norm = partial(_norm, shape=shape, eps=eps)
    length = math.prod(shape)
    rows = Rows(input.numel() // length // len(input) if input.ndim > len(shape) else 1)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return normalised(run, "rms_norm", call, norm, input, weight, None, rows, length, eps, centred=False)


def _norm(input: Tensor, weight: Tensor | None, bias: None, *, shape: tuple[int, ...], eps: float | None) -> Tensor:
    return F.rms_norm(input, shape, weight, eps)
