"""Train and score every arm, and keep one JSON per run: finished runs are not repeated."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import agd_fast as agd
from agd_fast import Teacher, TrainConfig
from agd_fast.adapters import AdapterTooLargeError, count_parameters
from agd_fast.attaching import require_attachment
from agd_fast.distillation.calibration import calibration_of
from agd_fast.environment import environment
from agd_fast.evaluation.explained import SCALES, Student
from agd_fast.files import differences, read_json, read_tensors, write_json, write_tensors
from agd_fast.trajectories import Trajectories, collect
from nfe_speed import commit
from quality.arms import FULL, TEXT, Arm
from quality.scoring import (
    CALIBRATION_SEED,
    Sizes,
    cfg,
    draw,
    explained_on,
    explained_on_all_states,
    measure,
    real_images,
    unguided,
)
from quality.students import GUIDANCE_RANGE, full_finetune, text_embedding
from quality.teachers import BenchTeacher

GRID_IMAGES = 20  # the first of each arm, kept for pictures
SIZES_NAME = "sizes.json"


def run_arms(
    bench: BenchTeacher,
    arms: list[Arm],
    output: Path,
    *,
    sizes: Sizes,
    scales: tuple[float, ...] = SCALES,
    minutes: float | None = None,
) -> Path:
    """Run the missing arms and merge the whole folder; returns the merged file, `output`.json.

    An arm that cannot be as small as its fraction is reported and skipped.

    scales: ω of the images. minutes: start no further run after that long; the same call then continues.
    Raises: ValueError when the folder holds runs of other sizes.
    """
    require_sizes(output, sizes)
    start = time.monotonic()
    for number, arm in enumerate(arms):
        if (output / f"{arm.name}.json").is_file():
            continue
        if minutes is not None and time.monotonic() - start > 60 * minutes:
            print(f"stopped after {minutes:g} minutes with {len(arms) - number} runs to look at; the same command goes on")
            break
        reference = references(bench, arm.seed, output, sizes, scales)
        try:
            row = run_arm(bench, arm, reference, output, sizes, scales)
        except AdapterTooLargeError as error:
            print(f"{number + 1}/{len(arms)} {arm.name} skipped: {error}", flush=True)
            continue
        write_json(output / f"{arm.name}.json", row)
        explained = {states: f"{found['mean']:.3f}" for states, found in row["explained"].items()}
        print(f"{number + 1}/{len(arms)} {arm.name}: {row['fraction']:.2%}, explained {explained}", flush=True)
    return merge(bench, output, sizes)


def require_sizes(output: Path, sizes: Sizes) -> None:
    """Runs are not repeated, so a folder must have one set of sizes. Raises: ValueError when it has others."""
    path = output / SIZES_NAME
    if path.is_file() and (found := differences(asdict(sizes), read_json(path))):
        raise ValueError(f"{output} holds runs of other sizes ({found}); expected another --output")
    write_json(path, asdict(sizes))


def run_arm(
    bench: BenchTeacher,
    arm: Arm,
    reference: dict[str, Tensor],
    output: Path,
    sizes: Sizes,
    scales: tuple[float, ...],
) -> dict[str, Any]:
    """Train one student and score it; returns its row of the result file."""
    start = time.perf_counter()
    student, parameters, owner = train_student(bench, arm, output)
    trained = time.perf_counter()
    row: dict[str, Any] = {
        "arm": arm.to_dict(),
        "name": arm.name,
        "parameters": parameters,
        "fraction": parameters / count_parameters(bench.teacher.denoiser),
        "explained": explained_on_all_states(bench, student, sizes),
        "images": {},
    }
    grid = {}
    for omega in scales:
        images = draw(bench, student, omega, arm.seed, sizes)
        row["images"][f"{omega:g}"] = measure(bench, images, reference[f"cfg/{omega:g}"])
        grid[f"{omega:g}"] = images[:GRID_IMAGES]
    if owner is not None:
        row["calibrated"] = calibrated(bench, owner, arm.seed, reference, output, sizes)
    write_tensors(output / f"{arm.name}.safetensors", grid)
    agd.unload(bench.teacher)
    row["seconds"] = {"train": trained - start, "score": time.perf_counter() - trained}
    return {**row, "environment": environment(), "commit": commit()}


def calibrated(
    bench: BenchTeacher, owner: Teacher, seed: int, reference: Mapping[str, Tensor], output: Path, sizes: Sizes
) -> dict[str, dict[str, Any]]:
    """Calibrate the adapter of `owner` and score it again: what it explains, and images at CFG's best ω with this seed."""
    student = owner.predict_agd
    measured = explained_on(bench, "guided", sizes, CALIBRATION_SEED, student)
    require_attachment(owner).adapter.calibrate(calibration_of(measured, GUIDANCE_RANGE))
    cfg = read_json(reference_file(output, seed).with_suffix(".json"))["cfg"]
    omega = min(cfg, key=lambda scale: cfg[scale]["frechet"])
    images = draw(bench, student, float(omega), seed, sizes)
    return {
        "explained": {"guided": explained_on(bench, "guided", sizes, student=student).to_dict()},
        "images": {omega: measure(bench, images, reference[f"cfg/{omega}"])},
    }


def train_student(bench: BenchTeacher, arm: Arm, output: Path) -> tuple[Student, int, Teacher | None]:
    """A student trained as the arm says, its number of parameters, and the teacher whose adapter predicts, if one does."""
    config = TrainConfig(steps=arm.steps, learning_rate=arm.learning_rate, weighting=arm.weighting, seed=arm.seed)
    if arm.kind == FULL:
        owner, parameters = full_finetune(bench.teacher, _states(bench, arm, "trajectories", output), config)
        return owner.predict_agd, parameters, owner
    if arm.kind == TEXT:
        return (*text_embedding(bench.teacher, _states(bench, arm, "trajectories", output), config), None)
    folder, common = output / arm.name, {"conditions": bench.table, "validation": 0, "seed": arm.seed}
    if arm.source == "student":  # one round of DAgger: half of the steps on guided states, half on the student's own
        half = TrainConfig(steps=arm.steps // 2, learning_rate=arm.learning_rate, weighting=arm.weighting, seed=arm.seed)
        states = _states(bench, arm, "trajectories", output)
        first = output / f"{arm.name}-first"
        agd.distill(bench.teacher, output_dir=first, adapter=arm.adapter, train_config=half, trajectories=states, **common)
        agd.unload(bench.teacher)
        result = agd.distill(
            bench.teacher,
            output_dir=folder,
            init=first,
            source="student",
            train_config=half,
            trajectories=arm.trajectories,
            keep_steps=arm.keep,
            **common,
        )
    else:
        states = _states(bench, arm, arm.source, output)
        result = agd.distill(
            bench.teacher, output_dir=folder, adapter=arm.adapter, train_config=config, trajectories=states, **common
        )
    return bench.teacher.predict_agd, result.parameters, bench.teacher


def _states(bench: BenchTeacher, arm: Arm, source: str, output: Path) -> Trajectories:
    """The states of a source and seed, collected once for all arms."""
    return collect(
        bench.teacher,
        bench.table,
        output / f"states-{source}-{arm.states}-seed{arm.seed}",
        trajectories=arm.trajectories,
        keep=arm.keep,
        guidance_range=GUIDANCE_RANGE,
        source=source,  # type: ignore[arg-type]
        data=real_images(bench) if source == "data" else None,
        seed=arm.seed,
    )


def references(
    bench: BenchTeacher, seed: int, output: Path, sizes: Sizes, scales: tuple[float, ...] = SCALES
) -> dict[str, Tensor]:
    """Images without guidance and of CFG at every scale, from the noise of a seed; drawn and measured only once."""
    file = reference_file(output, seed)
    if file.with_suffix(".json").is_file():
        images, row = dict(read_tensors(file)[0]), read_json(file.with_suffix(".json"))
    else:
        images = {"unguided": draw(bench, unguided(bench), 1.0, seed, sizes)}
        row = {"seed": seed, "unguided": measure(bench, images["unguided"]), "cfg": {}, "unguided_rmse": {}}
    missing = [omega for omega in scales if f"{omega:g}" not in row["cfg"]]
    for omega in missing:
        target = images[f"cfg/{omega:g}"] = draw(bench, cfg(bench), omega, seed, sizes)
        row["cfg"][f"{omega:g}"] = measure(bench, target)
        row["unguided_rmse"][f"{omega:g}"] = measure(bench, images["unguided"], target)["rmse"]
    if missing:
        write_tensors(file, images)
        write_json(file.with_suffix(".json"), row)
    return images


def reference_file(output: Path, seed: int) -> Path:
    return output / f"reference-seed{seed}.safetensors"


def merge(bench: BenchTeacher, output: Path, sizes: Sizes) -> Path:
    """Merges all runs of a folder into one file beside it."""
    rows = {path.stem: read_json(path) for path in sorted(output.glob("*.json"))}
    of_reference = [row for name, row in rows.items() if name.startswith("reference-")]
    merged = {
        "environment": environment(),
        "commit": commit(),
        "teacher": bench.record,
        "floor": bench.floor,
        "inception_floor": bench.inception_floor,
        "sizes": asdict(sizes),
        "references": of_reference,
        "rows": [row for row in rows.values() if "arm" in row],
        "claims": [row for row in rows.values() if "claim" in row],
    }
    path = output.with_suffix(".json")
    write_json(path, merged)
    if of_reference and merged["rows"]:
        _write_grid(output, merged["rows"], of_reference[0])
    return path


def _write_grid(output: Path, rows: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """The first images of the arm that explains most, at CFG's best ω, beside those of CFG and without guidance."""
    omega = min(reference["cfg"], key=lambda scale: reference["cfg"][scale]["frechet"])
    same = [row for row in rows if row["arm"]["seed"] == reference["seed"] and row["arm"]["kind"] != FULL]
    drawn = [row for row in same if omega in row["images"]]
    if not drawn:
        return
    best = max(drawn, key=lambda row: row["explained"]["guided"]["mean"])
    images = read_tensors(reference_file(output, reference["seed"]))[0]
    grid = {"unguided": images["unguided"][:GRID_IMAGES], "cfg": images[f"cfg/{omega}"][:GRID_IMAGES]}
    grid["agd"] = read_tensors(output / f"{best['name']}.safetensors")[0][omega]
    write_tensors(output.with_name(f"{output.name}_grid.safetensors"), grid, {"omega": omega, "name": best["name"]})
