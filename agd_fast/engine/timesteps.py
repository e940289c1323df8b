"""From a scheduler's timesteps to what its denoiser is given at each step."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.spec import DenoiserSpec

TRAINED = 1000  # timesteps of the noise schedules of diffusers' models


def arguments_of(timesteps: Tensor, spec: DenoiserSpec, seen: list[Tensor]) -> Tensor | None:
    """The timestep argument at each step [T] on the CPU, in the dtype of those that were `seen` so far; None where none of the
    ways in which pipelines make it gives these, or they differ within a batch.

    Waits for the device.
    """
    dtype, times = seen[-1].dtype, timesteps.to("cpu", torch.float64)
    ways = (_scaled(times, spec).to(dtype), _scaled(times.float(), spec).to(dtype), _scaled(times.to(dtype), spec).to(dtype))
    if seen[-1].device.type == "meta":
        return ways[0]
    observed = [one.unique().cpu() for one in seen]
    if any(len(one) != 1 for one in observed):
        return None
    return next((way for way in ways if all((way == one).any() for one in observed)), None)


def _scaled(times: Tensor, spec: DenoiserSpec) -> Tensor:
    if not spec.timestep_ascends:
        times = TRAINED - times
    return times if spec.timestep_scale == 1 else times / spec.timestep_scale
