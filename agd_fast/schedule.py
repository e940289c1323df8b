"""Following a schedule with diffusers' schedulers: the loops that sampling, collecting and measuring share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]  # scaled x_t [B, C, ...], t [B] → prediction [B, C, ...]


def integrate(
    scheduler: Any,
    noise: Tensor,
    steps: int,
    predict: Predict,
    *,
    generator: torch.Generator | list[torch.Generator] | None = None,
    progress: Callable[[], object] | None = None,
) -> Tensor:
    """Run a schedule of `steps` from standard normal noise [B, C, ...] to samples of that shape.

    generator: for the noise of stochastic schedulers; one, or one per sample.
    """
    scheduler = copy.deepcopy(scheduler)  # schedulers hold the state of the loop
    scheduler.set_timesteps(steps)  # on the CPU, where schedulers look up their tables: no sync in the loop
    times = scheduler.timesteps.to(noise.device)
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    for t, time in zip(scheduler.timesteps, times, strict=True):
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = predict(scaled, time.expand(len(x)))
        x = scheduler.step(prediction, t, x, return_dict=False, **extra)[0]
        if progress is not None:
            progress()
    return x


def visit_noised(scheduler: Any, samples: Tensor, steps: int, predict: Predict, *, generator: torch.Generator) -> None:
    """Call `predict` on samples [B, C, ...] noised at each timestep of a schedule of `steps`, with fresh noise each time."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, device=samples.device)
    for t in scheduler.timesteps:
        scheduler.set_timesteps(steps, device=samples.device)  # resets the step index: it is found from t, as no step is taken
        noise = torch.randn(samples.shape, generator=generator).to(samples)
        times = t.expand(len(samples))
        if hasattr(scheduler, "scale_noise"):  # flow matching
            x = scheduler.scale_noise(samples, times, noise)
        else:
            x = scheduler.add_noise(samples, noise, times)
        predict(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, times)


def number_of_calls(scheduler: Any, steps: int) -> int:
    """Number of calls of the denoiser in a schedule of `steps`; some schedulers make more than one per step."""
    shifted = "mu" in inspect.signature(scheduler.set_timesteps).parameters and scheduler.config.get("use_dynamic_shifting")
    return len(timesteps_for(scheduler, steps, **({"mu": 1.0} if shifted else {})))  # a shift by resolution only moves them


def timesteps_for(scheduler: Any, steps: int, **settings: Any) -> Tensor:
    """The timesteps [T] at which the denoiser is called in a schedule of `steps`."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps, **settings)
    return scheduler.timesteps


def prediction_type_of(scheduler: Any) -> str:
    """What the denoiser predicts under a diffusers scheduler; flow-matching schedulers do not state it."""
    return getattr(scheduler.config, "prediction_type", None) or "flow_prediction"
