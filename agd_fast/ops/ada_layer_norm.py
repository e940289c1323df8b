"""A layer norm with its own γ and β for each sample: adaLN (arXiv 2212.09748, section 3.2), and modulation adapters on norms."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.defining import define, row


def ada_layer_norm_ref(x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x − mean)/√(var + ε)·γ + β over the last dimension.

    x: [B, ..., C]; gamma, beta: [B or 1, C], or None for 1 and 0 → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("ada_layer_norm", x=x, gamma=gamma, beta=beta)
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    normed = normed if gamma is None else normed * row(gamma, x)
    return normed if beta is None else normed + row(beta, x)


ada_layer_norm = define(ada_layer_norm_ref)
