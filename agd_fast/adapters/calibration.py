"""Asking an adapter for more guidance where it gives less than its teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """(ω, t) → the ω′ at which the adapter guides as strongly as its teacher does at ω: 1 + (ω − 1)·factor(ω, t).

    times: t [T], ascending. omegas: ω [W], ascending. factors: [T, W], interpolated linearly and constant outside of these.
    guidance_range: the ω that training saw; ω′ stays within it, unless ω does not.
    Raises: ValueError when the shapes do not fit, times, omegas or the range do not ascend, or a factor is not a positive number.
    """

    times: Tensor
    omegas: Tensor
    factors: Tensor
    guidance_range: Tensor  # [2]
    time_gaps: Tensor  # [T − 1]
    omega_gaps: Tensor  # [W − 1]

    def __init__(
        self,
        times: Sequence[float],
        omegas: Sequence[float],
        factors: Sequence[Sequence[float]],
        guidance_range: Sequence[float],
    ) -> None:
        super().__init__()
        self.values = {"times": times, "omegas": omegas, "factors": factors, "guidance_range": list(guidance_range)}
        found = {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in self.values.items()}
        shape = (len(times), len(omegas))
        of_factors = found["factors"].shape
        wrong = [factor for factor in found["factors"].flatten().tolist() if not 0 < factor < math.inf]
        if of_factors != shape or wrong:
            here = f"{list(of_factors)}{f', among them {wrong[0]:g}' if wrong else ''}"
            raise ValueError(f"expected positive factors {list(shape)} of a calibration, found {here}")
        for name, least in (("times", 1), ("omegas", 1), ("guidance_range", 2)):
            knots = found[name]
            if knots.ndim != 1 or len(knots) < least or not torch.isfinite(knots).all() or not (knots.diff() > 0).all():
                raise ValueError(f"expected ascending {name} of a calibration, found {self.values[name]}")
        gaps = {"time_gaps": found["times"].diff(), "omega_gaps": found["omegas"].diff()}
        for name, value in {**found, **gaps}.items():
            self.register_buffer(name, value, persistent=False)  # saved with the config

    def forward(self, omega: Tensor, timestep: Tensor) -> Tensor:
        """ω [B], t [B] → ω′ [B]."""
        at_time = _between(timestep, self.times, self.time_gaps)  # [B, T]
        at_omega = _between(omega, self.omegas, self.omega_gaps)  # [B, W]
        factor = (at_time[:, :, None] * at_omega[:, None, :] * self.factors).sum((1, 2))
        low, high = self.guidance_range
        return (1 + (omega - 1) * factor).maximum(omega.minimum(low)).minimum(omega.maximum(high))

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        return cls(**value)


def _between(x: Tensor, knots: Tensor, gaps: Tensor) -> Tensor:
    """Weights [B, K] of linear interpolation of x [B] between knots [K], which are gaps [K − 1] apart."""
    passed = ((x[:, None] - knots[:-1]) / gaps).clamp(0, 1)  # [B, K − 1], how far each gap is passed
    ones = torch.ones_like(x, dtype=passed.dtype)[:, None]
    return torch.cat([ones, passed], dim=1) - torch.cat([passed, torch.zeros_like(ones)], dim=1)
