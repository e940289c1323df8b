"""guidance_explained: how much of the guidance signal one pass reproduces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agd_fast.attaching import require_attachment
from agd_fast.sampling import Data, require_data
from agd_fast.teacher import Conditions, State, Teacher

States = Literal["guided", "data", "student"]
Student = Callable[[Tensor, Tensor, Conditions, Tensor], Tensor]  # x_t, t [B], conditions, ω [B] → prediction
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Explained:
    """Guidance explained, 1 − Σ‖ĝ − g‖² / Σ‖g‖² with g = ε_cfg − ε(c) and ĝ = ε̂_agd − ε(c): 1 is perfect, 0 is the unguided base.

    mean: over scales.
    by_scale: ω → explained.
    by_time: t → explained, all scales together.
    strength_by_scale: ω → Σ⟨ĝ, g⟩ / Σ‖g‖²: how strong the adapter's guidance is along CFG's. Below 1 it is weaker, as least
        squares makes it if g is not learnt fully; a guidance scale of 1 + (ω − 1) / strength is then nearer to CFG's at ω.
    strength_by_time: ω → t → strength.
    """

    mean: float
    by_scale: dict[float, float]
    by_time: dict[float, float]
    strength_by_scale: dict[float, float]
    strength_by_time: dict[float, dict[float, float]] = field(repr=False)

    @property
    def strength(self) -> float:
        """The mean over scales."""
        return _mean(self.strength_by_scale)

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "by_scale": {f"{omega:g}": value for omega, value in self.by_scale.items()},
            "by_time": {f"{t:g}": value for t, value in self.by_time.items()},
            "strength": self.strength,
            "strength_by_scale": {f"{omega:g}": value for omega, value in self.strength_by_scale.items()},
        }


def guidance_explained(
    teacher: Teacher,
    conditions: Conditions,
    *,
    states: States = "guided",
    data: Data | None = None,
    student: Student | None = None,
    scales: tuple[float, ...] = SCALES,
    steps: int = 25,
    seed: int = 1,
    batch_size: int | None = None,
) -> Explained:
    """Measure the attached adapter, or another student, against the teacher's guided predictions.

    conditions: one per trajectory, batch first; each is run once at every ω of `scales` (standard convention, ω ≠ 1).
    states: the states at which predictions are compared.
        - "guided": those of the teacher's own trajectories.
        - "student": those of trajectories that the adapter drives, which it meets when it samples.
        - "data": samples noised at the timesteps of the schedule; `data` = (samples [M, C, H, W], for each of them the row of
          `conditions` that it goes with [M]).
    student: what predicts in one pass; None is the teacher with its attached adapter.
    seed: seed of all noise, which is the same for every adapter. States are held out if this seed was not used for training.
    batch_size: trajectories at once; None takes 100, or as many as a pipeline runs.
    Raises: ValueError if no adapter is attached, or if `states` is unknown or does not go with `data`.
    """
    if student is None:
        require_attachment(teacher)
        student = teacher.predict_agd
    if states not in get_args(States) or (states == "data") != (data is not None):
        raise ValueError(
            f"states must be one of {get_args(States)}, 'data' with data=(samples, condition rows); "
            f"found {states!r}, data {'None' if data is None else 'given'}"
        )
    count = len(next(iter(conditions.values())))
    generator = torch.Generator().manual_seed(seed)
    if data is None:
        start = teacher.start(count, generator)
    else:
        require_data(data, conditions, teacher.sample_shape)
        start, count = data[0], len(data[0])
        conditions = {name: value[data[1]] for name, value in conditions.items()}
    batch_size = batch_size or (teacher.run_size if teacher.one_scale_a_run else 100)
    slices = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    found: dict[float, Tensor] = {}  # ω → [steps, 3]
    times: list[float] = []
    for omega in scales:
        parts = []
        for rows in slices:
            part = {name: value[rows].to(teacher.device) for name, value in conditions.items()}
            times, sums = _compare(teacher, student, part, states, omega, start[rows], steps, generator)
            parts.append(sums)
        found[omega] = torch.stack(parts).sum(0)
    by_scale = {omega: _explained(sums.sum(0)) for omega, sums in found.items()}
    strengths = {omega: _strength(sums.sum(0)) for omega, sums in found.items()}
    total = torch.stack(list(found.values())).sum(0)
    by_time = {t: _explained(row) for t, row in _at_times(times, total).items()}
    strength_by_time = {omega: {t: _strength(row) for t, row in _at_times(times, sums).items()} for omega, sums in found.items()}
    return Explained(_mean(by_scale), by_scale, by_time, strengths, strength_by_time)


def _compare(
    teacher: Teacher,
    student: Student,
    conditions: Conditions,
    states: States,
    omega: float,
    start: Tensor,
    steps: int,
    generator: torch.Generator,
) -> tuple[list[float], Tensor]:
    """From `start`, noise or data [B, C, ...]: t [steps], and Σ‖ĝ − g‖², Σ‖g‖², Σ⟨ĝ, g⟩ [steps, 3]."""
    scale = torch.full((len(start),), omega)
    times: list[Tensor] = []
    sums: list[Tensor] = []

    def visit(state: State) -> Tensor:
        target, cond = state.target, state.cond()
        prediction = student(state.sample, state.timestep, state.arguments, scale.to(target.device))
        guidance, of_student = _difference(target, cond), _difference(prediction, cond)
        error = _difference(prediction, target)
        sums.append(torch.stack([error.square().sum(), guidance.square().sum(), (of_student * guidance).sum()]))
        times.append(state.timestep[0].amax())  # tokens may have their own t, which is 0 for given ones
        return prediction if states == "student" else target

    with torch.no_grad():  # no inference mode: weights offloaded meanwhile could never be trained again
        teacher.run(conditions, start, scale, steps, visit, generator=generator, noised=states == "data")
    return torch.stack(times).tolist(), torch.stack(sums)


def _at_times(times: Iterable[float], sums: Tensor) -> dict[float, Tensor]:
    """t → the sum of its rows of `sums` [steps, 3]: some schedulers visit a t twice."""
    found: dict[float, Tensor] = {}
    for t, row in zip(times, sums, strict=True):
        found[t] = found.get(t, torch.zeros_like(row)) + row
    return found


def _difference(a: Tensor, b: Tensor) -> Tensor:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) - b.to(wide)


def _explained(sums: Tensor) -> float:
    error, signal, _ = sums.tolist()
    return 1 - error / signal if signal else float("nan")


def _strength(sums: Tensor) -> float:
    _, signal, along = sums.tolist()
    return along / signal if signal else float("nan")


def _mean(by_scale: Mapping[float, float]) -> float:
    return sum(by_scale.values()) / len(by_scale)
