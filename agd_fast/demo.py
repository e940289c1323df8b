"""The whole method on the digits that ship with the package: collect, distil, sample, measure."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agd_fast.attaching import unload
from agd_fast.datasets import digits_classifier, digits_images, digits_teacher
from agd_fast.distillation import TrainConfig, distill
from agd_fast.evaluation import Evaluation, Reference, evaluate
from agd_fast.evaluation.bars import Bar, quality_bars, speed_bars
from agd_fast.evaluation.evaluate import ARMS, arm_sampler
from agd_fast.reporting.report import write_report
from agd_fast.teacher import Teacher

GUIDANCE_RANGE = (1.0, 6.0)
TIME_LIMIT = 180.0  # seconds, on two cores


@dataclass(frozen=True)
class Demo:
    result: Evaluation
    bars: list[Bar]
    report: dict[str, Any]
    directory: Path


def digits_reference() -> Reference:
    """The real digits, in the features of the classifier that ships."""
    classifier = digits_classifier()
    return Reference(digits_images()[0], classifier.features, classifier)


def run_demo(
    output_dir: str | os.PathLike[str] = "runs/demo",
    *,
    seed: int = 0,
    train_config: TrainConfig | None = None,
    samples: int = 2000,
    timing_rounds: int = 30,
    resume: bool = True,
    progress: bool = True,
) -> Demo:
    """Distil the shipped teacher into `output_dir` and compare one pass with two there.

    Writes what `distill` writes, and report.json, report.html, grid.png, curve.png.
    """
    directory = Path(output_dir)
    start = time.perf_counter()
    teacher = digits_teacher()
    distilled = distill(
        teacher,
        class_labels=range(10),
        guidance_range=GUIDANCE_RANGE,
        output_dir=directory,
        train_config=train_config,
        seed=seed,
        validation=0,
        resume=resume,
        progress=progress,
    )
    trained = time.perf_counter()
    result = evaluate(
        teacher,
        digits_reference(),
        class_labels=range(10),
        samples=samples,
        seed=seed,
        timing_rounds=timing_rounds,
        progress=progress,
    )
    grid = digits_grid(teacher, result)
    end = time.perf_counter()
    seconds = {
        "collect": distilled.seconds["collect"],
        "train": distilled.seconds["train"],
        "evaluate": end - trained,
        "total": end - start,
    }
    bars = [*quality_bars(result), *speed_bars(result), Bar("seconds in all", seconds["total"], TIME_LIMIT)]
    columns = [str(digit) for digit in range(10)]
    report = write_report(directory, result, grid, columns=columns, bars=bars, seconds=seconds)
    unload(teacher)
    return Demo(result, bars, report, directory)


def digits_grid(teacher: Teacher, result: Evaluation, seed: int = 7) -> dict[str, torch.Tensor]:
    """One sample a class and arm from the same noise, at CFG's best ω."""
    labels = torch.arange(10)
    noise = torch.randn(10, *teacher.sample_shape, generator=torch.Generator().manual_seed(seed))
    names = {
        "unguided": "unguided\n1 pass",
        "cfg": f"CFG ω = {result.guidance_scale:g}\n2 passes",
        "agd": f"AGD ω = {result.guidance_scale:g}\n1 pass",
    }
    return {
        names[arm]: arm_sampler(teacher, arm, labels, noise, result.guidance_scale, result.steps, len(labels))() for arm in ARMS
    }
