"""How good a student is: the guidance it explains on three kinds of states, and its images beside those of CFG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from agd_fast.evaluation import Explained, Reference, States, frechet_distance, guidance_explained
from agd_fast.evaluation.explained import Student
from agd_fast.schedule import integrate
from agd_fast.teacher import Conditions
from quality.classifier import features_of
from quality.data import to_pixels
from quality.teachers import BenchTeacher

BATCH = 250
STATES_SEED = 10_000  # for the states that all students are scored on
CALIBRATION_SEED = 20_000  # for the states that adapters are calibrated on


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements: images per arm and scale, trajectories for the explained share, steps of the schedule."""

    samples: int = 2000
    trajectories: int = 100
    steps: int = 25


def explained_on_all_states(bench: BenchTeacher, student: Student | None, sizes: Sizes) -> dict[str, Any]:
    """State kind → what guidance_explained says of the student; None for the attached adapter."""
    return {states: explained_on(bench, states, sizes, student=student).to_dict() for states in get_args(States)}


def explained_on(
    bench: BenchTeacher, states: States, sizes: Sizes, seed: int = STATES_SEED, student: Student | None = None
) -> Explained:
    assert bench.reference is not None
    rows = torch.arange(sizes.trajectories) % len(bench.row_labels)
    of_data = states == "data"
    return guidance_explained(
        bench.teacher,
        bench.table if of_data else {name: value[rows] for name, value in bench.table.items()},
        states=states,
        data=real_images(bench, sizes.trajectories) if of_data else None,
        student=student,
        steps=sizes.steps,
        seed=seed,
    )


def real_images(bench: BenchTeacher, count: int | None = None) -> tuple[Tensor, Tensor]:
    """Real images in [−1, 1] and the first row of the table for the class of each; `count` of them drawn at random."""
    assert bench.data is not None
    generator = torch.Generator().manual_seed(STATES_SEED)
    rows = torch.randperm(len(bench.data.images), generator=generator)[:count]
    first = {int(label): row for row, label in reversed(list(enumerate(bench.row_labels.tolist())))}
    return to_pixels(bench.data.images[rows]), torch.tensor([first[int(label)] for label in bench.data.labels[rows]])


def draw(bench: BenchTeacher, predict: Student, omega: float, seed: int, sizes: Sizes, scheduler: Any = None) -> Tensor:
    """Images [N, C, H, W] on the CPU, cycling through the classes; the same noise for the same seed."""
    teacher = bench.teacher
    generator = torch.Generator().manual_seed(seed)  # also for the steps' noise, if the scheduler draws any
    noise = torch.randn(sizes.samples, *teacher.sample_shape, generator=generator)
    rows = image_rows(bench, sizes.samples)
    images = []
    with torch.inference_mode():
        for part in torch.arange(sizes.samples).split(BATCH):
            conditions = {name: value[rows[part]].to(teacher.device) for name, value in bench.table.items()}
            scale = torch.full((len(part),), omega, device=teacher.device)
            start = noise[part].to(teacher.device)

            def step(x: Tensor, t: Tensor, c: Conditions = conditions, w: Tensor = scale) -> Tensor:
                return predict(x, t, c, w)

            images.append(integrate(scheduler or teacher.scheduler, start, sizes.steps, step, generator=generator).cpu())
    return torch.cat(images)


def image_rows(bench: BenchTeacher, count: int) -> Tensor:
    return torch.arange(count) % len(bench.row_labels)


def cfg(bench: BenchTeacher) -> Student:
    return lambda x, t, conditions, omega: bench.teacher.predict_cfg(x, t, conditions, omega)[0]


def unguided(bench: BenchTeacher) -> Student:
    return lambda x, t, conditions, omega: bench.teacher.predict(x, t, conditions)


def measure(bench: BenchTeacher, images: Tensor, target: Tensor | None = None) -> dict[str, float]:
    """Fréchet distance to the real images, class accuracy, and RMSE to `target`, CFG's images from the same noise.

    "fid" is the Fréchet distance in Inception's features, where the bench has them.
    """
    assert bench.reference is not None and bench.reference.classify is not None
    device = bench.reference.images.device
    with torch.inference_mode():
        predicted = torch.cat([bench.reference.classify(part.to(device)).argmax(1).cpu() for part in images.split(BATCH)])
    labels = bench.row_labels[image_rows(bench, len(images))]
    accuracy = (predicted == labels).double().mean().item()
    found = {"frechet": distance_to_real(bench.reference, images), "accuracy": accuracy}
    if bench.inception is not None:
        found["fid"] = distance_to_real(bench.inception, images)
    if target is not None:
        found["rmse"] = (images - target).square().mean().sqrt().item()
    return found


def distance_to_real(reference: Reference, images: Tensor) -> float:
    real, fake = (features_of(reference, part).cpu() for part in (reference.images, images))
    return frechet_distance(real, fake)
