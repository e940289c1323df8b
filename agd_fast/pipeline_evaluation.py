"""Is one pass as good as two? A pipeline's adapters compared with its own guidance: pictures, numbers and a report of both."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from agd_fast.attaching import components_of, require_attachment
from agd_fast.distillation.phases import Phases
from agd_fast.distillation.teachers import Prompts, teachers_of
from agd_fast.evaluation.costs import Cost, costs_of
from agd_fast.evaluation.evaluate import describe_adapter
from agd_fast.evaluation.explained import Explained, guidance_explained
from agd_fast.evaluation.likeness import Scorer, Scores, black_in, features_of_folder, pictures_in
from agd_fast.evaluation.networks import Asked, load_networks
from agd_fast.evaluation.pictures import Pictures, Way
from agd_fast.evaluation.pipeline import PipelineEvaluation, PipelineScale
from agd_fast.files import fingerprint
from agd_fast.locking import only_writer
from agd_fast.pipelines import ARMS, Inputs, PipelineTeacher
from agd_fast.reporting.pipeline_report import write_pipeline_report
from agd_fast.warning import warn


def evaluate_pipeline(
    pipe: Any,
    *,
    output_dir: str | os.PathLike[str],
    prompts: Prompts | None = None,
    inputs: Inputs | None = None,
    call: Mapping[str, Any] | None = None,
    guidance_scales: Sequence[float] | None = None,
    steps: int = 30,
    samples: int | None = None,
    metrics: Asked = (),
    real: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    explained_prompts: int | None = None,
    timing_rounds: int = 5,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> PipelineEvaluation:
    """Compare the adapters' one pass with the pipeline's own guidance and with no guidance, from the same noise.

    These three arms all use the pipeline's own call. The guidance is the pipeline's own even if a guider taught the adapter.

    pipe: a diffusers pipeline with adapters attached.
    prompts: prompts that the adapters were not distilled on: a list, or a file with one per line.
    inputs, call: as in `agd_fast.distill`; `call` must be the one that the adapters were distilled with.
    guidance_scales: in the model family's own convention; None takes the middle of the trained range.
    samples: number of pictures per arm and scale, made from the inputs in turn; None takes one per input.
    metrics: names out of "lpips", "clip" and "fid", or a mapping from these to the network to use, or to a function in its place
        (see `agd_fast.evaluation.networks`). "fid" is the Fréchet distance to CFG's pictures and, if `real` is given, of all
        three arms to the real pictures.
    real: a folder of real pictures.
    batch_size: pictures at once; None takes 4, or 1 if samples cannot be batched. It does not change the noise.
    explained_prompts: how many of the inputs `guidance_explained` follows at every scale; None takes 8, 0 leaves it out.
    timing_rounds: number of interleaved timing rounds, with one batch per arm; 0 leaves them out.
    resume: go on with pictures that an interrupted call with the same settings left in output_dir; False deletes them.

    Writes pictures/, plan.json, report.json, report.html and grid.png. Of a video, the middle frame is compared. If a picture is
    black all over, because of a safety checker or values that are not finite, its number is left out of all arms, and counted by
    arm.
    Raises: ValueError for a pipeline without adapters or pictures, scales without guidance, or an output_dir of another
    evaluation; ImportError, OSError naming what a metric lacks; OSError if another process is writing to output_dir.
    """
    if prompts is None and inputs is None:
        raise ValueError("expected prompts, or inputs, that the adapter was not distilled on; found neither")
    teachers = _teachers(pipe, prompts, inputs, call)
    teacher = next(iter(teachers.values()))
    scales = _scales(teacher, guidance_scales)
    texts: Any = teacher.inputs.get("prompt", ())
    count = samples or len(teacher)
    _require_measurable(metrics, texts, count, real)
    networks = load_networks(metrics)
    batch = min(batch_size or teacher.run_size, count)
    pictures = Pictures(Path(output_dir), teacher, steps, seed)
    device = pipe._execution_device
    phases = Phases(device)
    ways = [Way("unguided"), *(Way(arm, scale) for scale in scales for arm in ("cfg", "agd"))]
    with only_writer(output_dir):
        pictures.open(_plan(teachers, steps, seed), resume)
        costs = _costs(pictures, scales[0], batch, timing_rounds, progress)
        phases.done("costs")
        pictures.make(ways, count, batch, progress)
        phases.done("pictures")
        explained = _explained(
            teachers, scales, steps, seed, teacher.validation_runs if explained_prompts is None else explained_prompts
        )
        phases.done("guidance explained")
        black = black_in(pictures, ways, count)
        numbers = _compared(black, count)
        features = None
        if real is not None and networks.features is not None:
            features = features_of_folder(Path(real), networks.features, Image.open(pictures.path(ways[0], 0)).size, device)
        scorer = Scorer(pictures, numbers, networks, texts, features, device)
        by_scale = {
            f"{scale:g}": PipelineScale(
                {name: one.by_scale[scale + teachers[name].spec.omega_offset] for name, one in explained.items()},
                {name: one.strength_by_scale[scale + teachers[name].spec.omega_offset] for name, one in explained.items()},
                _scores(scorer, scale),
            )
            for scale in scales
        }
        phases.done("scores")
        result = PipelineEvaluation(
            pipeline=type(pipe).__name__,
            adapters={name: describe_adapter(one) for name, one in teachers.items()},
            prompts=len(teacher),
            pictures=count,
            left_out=count - len(numbers),
            black={way: len(found) for way, found in black.items()},
            steps=steps,
            seed=seed,
            by_scale=by_scale,
            costs=costs,
            networks=networks.names,
            directory=Path(output_dir),
            seconds=phases.seconds,
        )
        write_pipeline_report(result, pictures, ways, numbers)
    return result


def _teachers(
    pipe: Any, prompts: Prompts | None, inputs: Inputs | None, call: Mapping[str, Any] | None
) -> dict[str, PipelineTeacher]:
    """The teachers by denoiser. Raises: ValueError when a denoiser lacks its adapter."""
    nothing: dict[str, Any] = dict.fromkeys(("class_labels", "conditions", "null_condition", "guider", "scheduler", "spec"))
    found = teachers_of(pipe, prompts=prompts, inputs=inputs, call=call, **nothing)
    teachers = {name: teacher for name, teacher, _ in found if isinstance(teacher, PipelineTeacher)}
    for teacher in teachers.values():
        require_attachment(teacher.denoiser)
    return teachers


def _scales(teacher: PipelineTeacher, given: Sequence[float] | None) -> tuple[float, ...]:
    offset = teacher.spec.omega_offset
    if given is None:
        given = [sum(require_attachment(teacher.denoiser).adapter.config.guidance_range) / 2 - offset]
    scales = tuple(dict.fromkeys(float(scale) for scale in given))
    if not scales or min(scales) + offset <= teacher.guides_above:
        raise ValueError(
            f"expected guidance_scales above {teacher.guides_above - offset:g}, which is no guidance; found {list(given)}"
        )
    return scales


def _require_measurable(metrics: Asked, texts: Sequence[str], count: int, real: str | os.PathLike[str] | None) -> None:
    if "clip" in metrics and not texts:
        raise ValueError("clip compares pictures with their prompts; expected prompts, found inputs without any")
    if "fid" in metrics and count < 2:
        raise ValueError(f"fid compares sets of pictures; expected at least 2 an arm (samples), found {count}")
    if real is not None and "fid" not in metrics:
        raise ValueError(f"expected 'fid' among metrics, for the distance to the real pictures in {real}; found {list(metrics)}")
    if real is not None:
        pictures_in(Path(real))


def _plan(teachers: Mapping[str, PipelineTeacher], steps: int, seed: int) -> dict[str, Any]:
    """Everything that determines the pictures except their scales and numbers."""
    teacher = next(iter(teachers.values()))
    settings = {name: str(value) for name, value in sorted(teacher.scheduler.config.items()) if not name.startswith("_")}
    return {
        "call": teacher.guidance_name,
        "inputs": teacher.fingerprints(teacher.conditions()),
        "denoisers": {name: fingerprint(one.denoiser.state_dict()) for name, one in teachers.items()},
        "adapters": {name: require_attachment(one.denoiser).adapter.hash for name, one in teachers.items()},
        "dtype": str(teacher.dtype),
        "scheduler": {"class": type(teacher.scheduler).__name__, **settings},
        "steps": steps,
        "seed": seed,
    }


def _costs(pictures: Pictures, scale: float, batch: int, rounds: int, progress: bool) -> dict[str, Cost]:
    runs: dict[str, Any] = {arm: partial(pictures.generate, Way(arm, scale), range(batch)) for arm in ARMS}
    pipe, spec = pictures.teacher.pipe, pictures.teacher.spec
    denoisers = components_of(pipe, spec).values()
    return costs_of(
        runs, denoisers, sample=spec.sample, batch=batch, rounds=rounds, device=pipe._execution_device, progress=progress
    )


def _explained(
    teachers: Mapping[str, PipelineTeacher], scales: Sequence[float], steps: int, seed: int, count: int
) -> dict[str, Explained]:
    """Guidance explained by denoiser, on the first `count` inputs; empty if `count` is 0."""
    found = {}
    for name, teacher in teachers.items() if count else ():
        table = {key: value[:count] for key, value in teacher.conditions().items()}
        omegas = tuple(scale + teacher.spec.omega_offset for scale in scales)
        found[name] = guidance_explained(teacher, table, scales=omegas, steps=steps, seed=seed + 1)
    return found


def _compared(black: Mapping[str, Sequence[int]], count: int) -> list[int]:
    """The numbers at which no way's picture is black all over. Raises: ValueError when none is left."""
    out = {number for found in black.values() for number in found}
    whose = ", ".join(f"{len(found)} of {way}" for way, found in black.items())
    why = f"({whose}): a safety checker's, or values that are not finite?"
    if len(out) == count:
        raise ValueError(f"expected pictures, found one that is black all over for each of {count} inputs {why}")
    if out:
        warn(f"{len(out)} of {count} are left out, as a picture of theirs is black all over {why}")
    return [number for number in range(count) if number not in out]


def _scores(scorer: Scorer, scale: float) -> dict[str, Scores]:
    target = Way("cfg", scale)
    return {
        "unguided": scorer.score(Way("unguided"), target),
        **{w.arm: scorer.score(w, target) for w in (target, Way("agd", scale))},
    }
