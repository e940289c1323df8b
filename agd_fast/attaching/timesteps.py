"""From a scheduler's timesteps to what its denoiser is given at them."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.spec import DenoiserSpec

TRAINED = 1000  # timesteps of the noise schedules of diffusers' models


def ways_to_pass(timesteps: Tensor, spec: DenoiserSpec, argument: Tensor) -> list[Tensor]:
    """What the denoiser is given at each of a scheduler's timesteps, [T] on the CPU, if `argument` is one of these: once for each
    way in which pipelines make it (rounded before or after it is scaled, or not scaled).

    None of a timestep that is not the scheduler's, and where a batch has several. Waits for the device; on "meta", where nothing
    is known, the first way is taken.
    """
    dtype, times = argument.dtype, timesteps.to("cpu", torch.float64)
    ways = [_scaled(times, spec), _scaled(times.float(), spec), _scaled(times.to(dtype), spec), times]
    ways = [way.to(dtype) for way in ways]
    if argument.device.type == "meta":
        return ways[:1]
    found = argument.detach().unique().cpu()
    return [way for way in ways if len(found) == 1 and (way == found).any()]


def position_of(timesteps: Tensor, spec: DenoiserSpec, argument: Tensor) -> int | None:
    """Which of a scheduler's timesteps a denoiser was given. Waits for the device."""
    ways = ways_to_pass(timesteps, spec, argument)
    return min((int((way == argument.flatten()[0].cpu()).nonzero()[0]) for way in ways), default=None)


def _scaled(times: Tensor, spec: DenoiserSpec) -> Tensor:
    if not spec.timestep_ascends:
        times = TRAINED - times
    return times if spec.timestep_scale == 1 else times / spec.timestep_scale
