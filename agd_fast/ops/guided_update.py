"""Guidance and the scheduler's update in one: steps of first-order solvers are linear in x_t and the prediction."""

from __future__ import annotations

from agd_fast_kernels.shapes import require
from torch import Tensor

from agd_fast.ops.defining import define
from agd_fast.ops.guidance_combine import guidance_combine_ref


def guided_update_ref(uncond: Tensor, cond: Tensor, omega: Tensor, sample: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x_{t−1} = a·x_t + b·ε_cfg, with ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)).

    uncond, cond, sample: [B, ...]; omega: [B or 1] float32; a, b: [B or 1] float32 → [B, ...].
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    require("guided_update", uncond=uncond, cond=cond, omega=omega, sample=sample, a=a, b=b)
    ones = [1] * (cond.ndim - 1)
    a, b = (scale.view(-1, *ones).to(cond.dtype) for scale in (a, b))
    return a * sample + b * guidance_combine_ref(uncond, cond, omega)


guided_update = define(guided_update_ref)
