"""The whole method on the digits that ship with the package: collect, distil, sample, measure."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agd_fast.datasets import digits_classifier, digits_images, digits_teacher
from agd_fast.distillation import TrainConfig, distill
from agd_fast.evaluation import Evaluation, Reference, evaluate
from agd_fast.evaluation.bars import Bar, quality_bars, speed_bars
from agd_fast.evaluation.evaluate import arm_sampler
from agd_fast.pipelines import ARMS
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
    """The real digits, and the shipped classifier for their features and classes."""
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
    continued = directory.exists()
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
    return report_digits(
        teacher,
        directory,
        samples=samples,
        seed=seed,
        timing_rounds=timing_rounds,
        progress=progress,
        earlier={name: distilled.seconds[name] for name in ("collect", "train")},
        limit=None if continued else TIME_LIMIT,  # work of an earlier run is not in this one's seconds
    )


def report_digits(
    teacher: Teacher,
    directory: Path,
    *,
    samples: int = 2000,
    steps: int = 25,
    seed: int = 0,
    timing_rounds: int = 30,
    progress: bool = True,
    earlier: Mapping[str, float] | None = None,
    limit: float | None = None,
) -> Demo:
    """Measure the adapter of a digits teacher and write the report to `directory`.

    earlier: seconds of the phases before this one. limit: a bar on the seconds of all phases.
    """
    start = time.perf_counter()
    result = evaluate(
        teacher,
        digits_reference(),
        class_labels=range(10),
        samples=samples,
        steps=steps,
        seed=seed,
        timing_rounds=timing_rounds,
        progress=progress,
    )
    grid = digits_grid(teacher, result)
    seconds = {**(earlier or {}), "evaluate": time.perf_counter() - start}
    seconds["total"] = sum(seconds.values())
    bars = [*quality_bars(result), *speed_bars(result)]
    if limit is not None:
        bars.append(Bar("seconds in all, on two idle cores", seconds["total"], limit))
    columns = [str(digit) for digit in range(10)]
    report = write_report(directory, result, grid, columns=columns, bars=bars, seconds=seconds)
    return Demo(result, bars, report, directory)


def digits_grid(teacher: Teacher, result: Evaluation, seed: int = 7) -> dict[str, torch.Tensor]:
    """One sample per class and arm from the same noise, at CFG's best ω."""
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
