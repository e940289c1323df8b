"""From a scheduler's timesteps to the values of t that its denoiser is given."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.spec import DenoiserSpec

TRAINED = 1000  # timesteps of the noise schedules of diffusers' models


def ways_to_pass(timesteps: Tensor, spec: DenoiserSpec, argument: Tensor) -> list[Tensor]:
    """What the denoiser is given at each of a scheduler's timesteps, [T] on the CPU: one tensor for each way of computing it by
    which `argument` is one of the values. Pipelines differ in whether they scale t, round it before or after that, divide it or,
    as CUDA divides by numbers, multiply it by the reciprocal, and, if t descends, reverse it before or after scaling.

    Empty if `argument` is none of the scheduler's timesteps, or if a batch has several. Waits for the device; on "meta", where
    values are unknown, the first way is taken.
    """
    dtype, known = argument.dtype, argument.device.type != "meta"
    times = timesteps.cpu().double()
    ways = [way for start in (times, times.float(), times.to(dtype)) for way in _scaled(start, spec)]
    ways = [way.to(dtype) for way in (*ways, times)]
    if not known:
        return ways[:1]
    found = argument.detach().cpu().unique()
    return [way for way in ways if len(found) == 1 and (way == found).any()]


def position_of(timesteps: Tensor, spec: DenoiserSpec, argument: Tensor) -> int | None:
    """Index of the scheduler's timestep that a denoiser was given; None if it is none of them. Waits for the device."""
    ways = ways_to_pass(timesteps, spec, argument)
    given = argument.flatten()[0].cpu()
    return min((int((way == given).nonzero()[0]) for way in ways), default=None)


def _scaled(times: Tensor, spec: DenoiserSpec) -> list[Tensor]:
    if spec.timestep_ascends:
        return _divided(times, spec.timestep_scale)
    late = [TRAINED / spec.timestep_scale - way for way in _divided(times, spec.timestep_scale)]
    return [*_divided(TRAINED - times, spec.timestep_scale), *late]  # reversed before or after scaling


def _divided(times: Tensor, scale: float) -> list[Tensor]:
    if scale == 1:
        return [times]
    reciprocal = 1 / torch.tensor(scale, dtype=torch.promote_types(times.dtype, torch.float32))
    return [times / scale, (times * reciprocal).to(times.dtype)]
