"""Asking an adapter for more guidance where it gives less than its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Calibration(nn.Module):
    """(ω, t) → the ω′ at which the adapter guides as strongly as its teacher does at ω: 1 + (ω − 1)·factor(ω, t).

    times: t [T], ascending. omegas: ω [W], ascending. factors: [T, W], interpolated linearly and constant outside of these.
    highest: the largest ω that training saw, which ω′ does not leave unless ω does.
    Raises: ValueError when the shapes do not fit, times or omegas do not ascend, or a factor is no positive number.
    """

    times: Tensor
    omegas: Tensor
    factors: Tensor

    def __init__(
        self, times: Sequence[float], omegas: Sequence[float], factors: Sequence[Sequence[float]], highest: float
    ) -> None:
        super().__init__()
        self.highest = float(highest)
        for name, values in {"times": times, "omegas": omegas, "factors": factors}.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)  # saved with the config
        shape = (len(times), len(omegas))
        if tuple(self.factors.shape) != shape or not (torch.isfinite(self.factors) & (self.factors > 0)).all():
            raise ValueError(f"expected positive factors of a calibration {shape}, found {tuple(self.factors.shape)}: {factors}")
        for name, knots in (("times", self.times), ("omegas", self.omegas)):
            if not len(knots) or not (knots.diff() > 0).all():
                raise ValueError(f"expected ascending {name} of a calibration, found {knots.tolist()}")

    def forward(self, omega: Tensor, timestep: Tensor) -> Tensor:
        """ω [B], t [B] → ω′ [B]."""
        weights = _between(timestep, self.times)[:, :, None] * _between(omega, self.omegas)[:, None, :]  # [B, T, W]
        factor = (weights * self.factors).sum((1, 2))
        return (1 + (omega - 1) * factor).minimum(omega.clamp(min=self.highest))

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name).tolist() for name in ("times", "omegas", "factors")}
        return {**values, "highest": self.highest}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Calibration:
        return cls(**value)


def _between(x: Tensor, knots: Tensor) -> Tensor:
    """Weights [B, K] of linear interpolation of x [B] between knots [K]."""
    passed = ((x.float()[:, None] - knots[:-1]) / knots.diff()).clamp(0, 1)  # [B, K − 1], how far each interval is passed
    ones = torch.ones_like(x, dtype=passed.dtype)[:, None]
    return torch.cat([ones, passed], dim=1) - torch.cat([passed, torch.zeros_like(ones)], dim=1)
