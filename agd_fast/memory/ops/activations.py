"""GELU and SiLU with their derivatives, in float32 or float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

APPROXIMATIONS = ("none", "tanh")
ROOT_2_OVER_PI, CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu(x: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def gelu_derivative(x: Tensor, approximate: str) -> Tensor:
    """Φ(x) + x·φ(x), or the derivative of the tanh form."""
    if approximate == "none":
        return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    tanh = torch.tanh(ROOT_2_OVER_PI * (x + CUBIC * x**3))
    inner = ROOT_2_OVER_PI * (1 + 3 * CUBIC * x * x)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner


def silu_derivative(x: Tensor) -> Tensor:
    """σ(x)·(1 + x·(1 − σ(x)))."""
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def require_approximate(op: str, approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"{op}: approximate must be one of {APPROXIMATIONS}, found {approximate!r}")
