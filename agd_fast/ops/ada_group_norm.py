"""A group norm with its own γ and β for each sample, and the activation after it: modulation adapters on a UNet's norms."""

from __future__ import annotations

from agd_fast_kernels.layouts import laid_like
from agd_fast_kernels.shapes import require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.defining import define, row


def ada_group_norm_ref(
    x: Tensor, groups: int, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5, silu: bool = False
) -> Tensor:
    """act((x − mean)/√(var + ε)·γ + β), mean and var over a group's channels and all positions; act is SiLU or nothing.

    x: [B, C, ...]; gamma, beta: [B or 1, C], or None for 1 and 0 → like x, channels-last where x is, else contiguous.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("ada_group_norm", x=x, gamma=gamma, beta=beta)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"ada_group_norm: groups must divide the {x.shape[1]} channels, found {groups}")
    normed = F.group_norm(x.contiguous(), groups, eps=eps)
    normed = normed if gamma is None else normed * row(gamma, x, 1)
    normed = normed if beta is None else normed + row(beta, x, 1)
    return laid_like(F.silu(normed) if silu else normed, x)


ada_group_norm = define(ada_group_norm_ref, launches=2, like="x")  # a group is too large for one block: sums first, then the norm
