"""Classifier-free guidance of two predictions (Ho & Salimans, arXiv 2207.12598, eq. 6 with ω = 1 + w)."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor

from agd_fast.ops.choice import call
from agd_fast.ops.defining import define


def guidance_combine_ref(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    """ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)).

    uncond, cond: [B, ...]; omega: [B or 1] float32 → [B, ...].
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("guidance_combine", uncond=uncond, cond=cond, omega=omega)
    scale = omega.view(-1, *[1] * (cond.ndim - 1)).to(cond.dtype)
    return uncond + scale * (cond - uncond)


_OP = define(guidance_combine_ref)


def guidance_combine(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    return call(_OP, uncond, cond, omega)


guidance_combine.__doc__ = guidance_combine_ref.__doc__
guidance_combine.__module__ = "agd_fast.ops"  # the name of this guidance rule in datasets on disk
