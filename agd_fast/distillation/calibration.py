"""Making up, by a changed ω, for the guidance strength that a trained adapter lacks compared with its teacher."""

from __future__ import annotations

import torch

from agd_fast.adapters.calibration import Calibration
from agd_fast.evaluation.explained import Explained

LARGEST_FACTOR = 1.5  # of (ω − 1); its inverse is the smallest. More of a guidance that is mostly wrong is no better


def calibration_of(found: Explained, guidance_range: tuple[float, float]) -> Calibration:
    """The calibration that makes up for the strengths that were measured of an adapter without calibration.

    guidance_range: the ω that training saw.
    """
    omegas = sorted(found.strength_by_time)
    times = sorted(found.strength_by_time[omegas[0]])
    strengths = torch.tensor([[found.strength_by_time[omega][t] for omega in omegas] for t in times])
    factors = (1 / strengths).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)
    factors = factors.where(strengths > 0, 1.0)  # no guidance, or one against the teacher's: there is nothing to raise
    return Calibration(times, omegas, factors.tolist(), guidance_range)
