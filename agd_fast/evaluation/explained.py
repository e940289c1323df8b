"""guidance_explained: how much of the guidance signal one pass reproduces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agd_fast.attaching import armed, require_attachment
from agd_fast.freezing import frozen
from agd_fast.sampling import integrate
from agd_fast.teacher import Conditions, Teacher

SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Explained:
    """1 − Σ‖ε̂_agd − ε_cfg‖² / Σ‖ε(c) − ε_cfg‖²: 1 is perfect, 0 is the unguided base.

    mean: over scales. by_scale: ω → explained. by_time: t → explained, all scales together.
    """

    mean: float
    by_scale: dict[float, float]
    by_time: dict[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "by_scale": {f"{omega:g}": value for omega, value in self.by_scale.items()},
            "by_time": {f"{t:g}": value for t, value in self.by_time.items()},
        }


def guidance_explained(
    teacher: Teacher,
    conditions: Conditions,
    *,
    scales: tuple[float, ...] = SCALES,
    steps: int = 25,
    seed: int = 1,
    batch_size: int = 100,
) -> Explained:
    """Measure the attached adapter on the states of the teacher's own guided trajectories.

    conditions: one a trajectory, batch first; each is run once at every ω of `scales` (standard convention, ω ≠ 1).
    seed: of the trajectories' noise; they are held out if it was not used for training.
    Raises: ValueError when no adapter is attached.
    """
    require_attachment(teacher)
    count = len(next(iter(conditions.values())))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *teacher.sample_shape, generator=generator)
    slices = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    errors: dict[float, Tensor] = {}  # ω → [steps, 2]
    times: list[float] = []
    for omega in scales:
        parts = []
        for rows in slices:
            part = {name: value[rows].to(teacher.device) for name, value in conditions.items()}
            times, sums = _errors_along(teacher, part, omega, noise[rows], steps, generator)
            parts.append(sums)
        errors[omega] = torch.stack(parts).sum(0)
    by_scale = {omega: _explained(sums.sum(0)) for omega, sums in errors.items()}
    total = torch.stack(list(errors.values())).sum(0)
    at_time: dict[float, Tensor] = {}  # some schedulers visit a t twice
    for t, row in zip(times, total, strict=True):
        at_time[t] = at_time.get(t, 0) + row
    by_time = {t: _explained(row) for t, row in at_time.items()}
    return Explained(sum(by_scale.values()) / len(by_scale), by_scale, by_time)


def _errors_along(
    teacher: Teacher, conditions: Conditions, omega: float, noise: Tensor, steps: int, generator: torch.Generator
) -> tuple[list[float], Tensor]:
    """Along guided trajectories from `noise`: t [steps], and Σ‖ε̂_agd − ε_cfg‖², Σ‖ε(c) − ε_cfg‖² [steps, 2]."""
    attachment = require_attachment(teacher)
    scale = torch.full((len(noise),), omega, device=teacher.device)
    times: list[Tensor] = []
    sums: list[Tensor] = []

    def predict(x: Tensor, t: Tensor) -> Tensor:
        target, cond = teacher.predict_cfg(x, t, conditions, scale)
        with armed(attachment, scale):
            student = teacher.predict(x, t, conditions)
        sums.append(torch.stack([_squared(student, target), _squared(cond, target)]))
        times.append(t[0])
        return target

    with frozen(teacher.denoiser), torch.inference_mode():
        integrate(teacher.scheduler, noise.to(teacher.device, teacher.dtype), steps, predict, generator=generator)
    return torch.stack(times).tolist(), torch.stack(sums)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() - b.float()).square().sum()


def _explained(sums: Tensor) -> float:
    error, signal = sums.tolist()
    return 1 - error / signal if signal else float("nan")
