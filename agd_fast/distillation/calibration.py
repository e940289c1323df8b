"""What a trained adapter lacks of its teacher's strength, made up for by ω."""

from __future__ import annotations

import torch

from agd_fast.adapters.calibration import Calibration
from agd_fast.evaluation.explained import Explained

MOST = (
    1.5  # the factor by which (ω − 1) is raised or lowered at most: an adapter that explains little is no better for more of it
)


def calibration_of(found: Explained, highest: float) -> Calibration:
    """The calibration that makes up for the strengths that were measured of an adapter without one.

    highest: the largest ω that training saw.
    """
    omegas = sorted(found.strength_by_time)
    times = sorted(found.strength_by_time[omegas[0]])
    strengths = torch.tensor([[found.strength_by_time[omega][t] for omega in omegas] for t in times])
    factors = (1 / strengths.clamp(1 / MOST, MOST)).nan_to_num(1.0)  # NaN: no guidance there
    return Calibration(times, omegas, factors.tolist(), highest)
