"""Rules of guidance other than CFG that an adapter can distil: functions at module level, which agd_fast identifies by name.

ω is in the standard convention: both give ε(c) at ω = 1, which an adapter with identity_at_one assumes.
"""

from __future__ import annotations

import math

from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from torch import Tensor

from agd_fast import ops

APG_THRESHOLD = 0.2  # root mean square of ε(c) − ε(∅); about its median on the digits teachers


def apg(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    """Adaptive projected guidance (arXiv 2410.02416) without momentum, η = 0: ε(c) + (ω − 1)·Δ⊥, where Δ = ε(c) − ε(∅) is cut
    to APG_THRESHOLD and Δ⊥ is its part orthogonal to ε(c). The projection is of the model's own output, as in diffusers.

    uncond, cond: [B, C, ...]; omega: [B].
    """
    scale = (omega - 1).view(-1, *[1] * (cond.ndim - 1)).to(cond.dtype)
    threshold = APG_THRESHOLD * math.sqrt(cond[0].numel())  # for the norm of a sample
    return normalized_guidance(cond, uncond, scale, eta=0.0, norm_threshold=threshold, use_original_formulation=True)


def cfg_zero_star(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    """CFG-Zero* (arXiv 2503.18886): CFG from α·ε(∅), α = ⟨ε(c), ε(∅)⟩ / ‖ε(∅)‖² per sample. Its zeroed first step is left
    out: it depends on the step's number, which a rule of two predictions does not get.

    uncond, cond: [B, C, ...]; omega: [B].
    """
    alpha = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1))  # [B, 1]
    return ops.guidance_combine(alpha.view(-1, *[1] * (cond.ndim - 1)) * uncond, cond, omega)
