"""The first half of a feed-forward block: a projection, an offset per sample and the activation, in one product."""

from __future__ import annotations

import torch
from agd_fast_kernels.shapes import require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.defining import define, row

ACTIVATIONS = ("geglu", "gelu", "gelu_tanh")


def activated_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "geglu") -> Tensor:
    """gelu(z) [B, ..., N] of z = x·weightᵀ + bias, by its definition or by tanh; for "geglu" z's first half times the gelu of its
    second half [B, ..., N/2] (Shazeer, arXiv 2002.05202).

    x: [B, ..., C]; weight: [N, C]; bias: [N], or one a sample [B, N] (an offset), or None.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit; for an unknown activation, or geglu with
        an odd N.
    """
    require("activated_linear", x=x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activated_linear: activation must be one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    if activation == "geglu" and len(weight) % 2:
        raise ValueError(f"activated_linear: weight must have an even number of rows for geglu, found {len(weight)}")
    shared = bias is None or bias.ndim == 1
    z = F.linear(x, weight, bias if shared else None)
    if bias is not None and not shared:
        z = z + row(bias, z)
    if activation != "geglu":
        return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")
    value, gate = z.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _flops(x: Tensor, weight: Tensor, *_: object) -> int:
    return 2 * x.numel() * len(weight)


def _by_library(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "geglu") -> Tensor:
    if not x.is_cuda or activation != "gelu_tanh" or bias is None or bias.ndim > 1:
        raise ValueError("no product of a library ends with this")
    product = torch._addmm_activation(bias, x.reshape(-1, x.shape[-1]), weight.t(), use_gelu=True)
    return product.view(*x.shape[:-1], len(weight))


activated_linear = define(activated_linear_ref, flops=_flops, library=_by_library)
