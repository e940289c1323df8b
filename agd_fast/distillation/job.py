"""Distilling one denoiser: collect, train, measure, write."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor
from tqdm.auto import tqdm

from agd_fast.adapters import Adapter, AdapterConfig, count_parameters
from agd_fast.adapters.calibration import Calibration
from agd_fast.attaching import attach, require_attachment, unload, wrap
from agd_fast.distillation.calibration import calibration_of
from agd_fast.distillation.config import TrainConfig
from agd_fast.distillation.economy import Economy
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.phases import Phases
from agd_fast.distillation.preview import preview
from agd_fast.distillation.residency import Residency
from agd_fast.distillation.tiling import decoder_of, tiled
from agd_fast.distillation.train import make_accelerator, train
from agd_fast.evaluation.explained import SCALES, Explained, guidance_explained
from agd_fast.files import differences, fingerprint, replacing, without_nan, write_json
from agd_fast.forward import device_of
from agd_fast.freezing import frozen
from agd_fast.memory.blocks import has_blocks
from agd_fast.memory.choose import Choice, Memory, budget_on, choose, estimator, ways_of
from agd_fast.memory.weight_codes import Kind
from agd_fast.pipelines.handed import PART
from agd_fast.storage import load, save
from agd_fast.teacher import Conditions, Teacher
from agd_fast.trajectories import Source, Trajectories, collect
from agd_fast.trajectories.collect import identity
from agd_fast.trajectories.manifest import as_json
from agd_fast.warning import described, warn

logger = logging.getLogger(__name__)

RESULT_NAME, PICTURE_NAME, VALIDATION_NAME = "distill.json", "samples.png", "validation"


@dataclass(frozen=True)
class DistillResult:
    """What `distill` returns.

    adapter: the trained adapter, attached to the teacher.
    output_dir: the folder that holds it.
    parameters, fraction: its number of parameters, absolute and as a fraction of the base's.
    loss: the last logged loss.
    explained: guidance_explained on held-out trajectories; None if not asked for.
    seconds: duration of each phase of this call.
    memory: how memory was saved and, on CUDA, the peak of each phase in bytes; None if no saving was asked for.
    passes: whether the training passes ran as CUDA graphs, and if not (all), why.
    others: results for a pipeline's further denoisers, by component.
    """

    adapter: Adapter = field(repr=False)
    output_dir: Path
    parameters: int
    fraction: float
    loss: float
    explained: Explained | None
    seconds: dict[str, float]
    memory: dict[str, Any] | None = None
    passes: dict[str, Any] | None = None
    others: dict[str, DistillResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """All that is decided about one run; see `distill` for what each means."""

    teacher: Teacher
    table: Conditions
    directory: Path
    config: AdapterConfig
    init: Path | None
    train_config: TrainConfig
    trajectories: int | Trajectories
    sampling_steps: int | tuple[int, int]
    keep_steps: int | None
    source: Source
    data: tuple[Tensor, Tensor] | None
    shard_size: int
    store_dtype: torch.dtype | None
    validation: int
    validate_every: int | None
    seed: int
    resume: bool
    tensorboard: bool
    progress: bool
    about: dict[str, Any]
    memory: Memory | None = None
    base_weights: Kind | None = None
    calibrate: bool = False


def run(job: Job) -> DistillResult:
    """Run a job. Leaves the adapter attached, or none when something is raised."""
    accelerator = make_accelerator(job.train_config.mixed_precision)
    residency = _residency(job, accelerator.device)
    with residency.kept():
        result = _run(job, accelerator, residency)
    result.adapter.to(device_of(job.teacher.denoiser))
    return result


def _residency(job: Job, device: torch.device) -> Residency:
    states = job.train_config.micro_batch_size or job.shard_size
    return Residency.of(job.teacher, device, job.memory, states, job.table)


def _run(job: Job, accelerator: Accelerator, residency: Residency) -> DistillResult:
    teacher = job.teacher
    with torch.random.fork_rng(), frozen(teacher.denoiser):
        torch.manual_seed(job.seed)
        loaded = None if job.init is None else require_attachment(load(teacher, job.init)).adapter
        attached = attach(teacher, job.config) if loaded is None else loaded
        try:
            wrap(teacher.owner)
            residency.place()
            attached.to(accelerator.device)
            if residency.why_streamed and accelerator.is_main_process:
                _say(job, f"states are collected and measured with weights that stay in host memory: {residency.why_streamed}")
            phases = Phases(accelerator.device)
            with accelerator.main_process_first():
                progress = job.progress and accelerator.is_main_process
                states = residency.run("collecting states", partial(_states, job, progress))
            phases.done("collect")
            attached.calibrate(None)  # drops that of `init`, which the states followed
            if not job.resume and accelerator.is_main_process:
                _forget_validation(job.directory / VALIDATION_NAME)
            settings = _settings(job, attached, states, accelerator.num_processes)
            loss, memory, passes = _train(job, states, settings, accelerator, residency)
            phases.done("train")
            if job.calibrate:
                attached.calibrate(residency.run("calibration", partial(_calibration, job)))
                phases.done("calibrate")
            explained = residency.run("validation", partial(_explained, job)) if job.validation else None
            phases.done("validate")
            if memory and phases.peak_bytes:
                memory["peak_bytes"] = phases.peak_bytes
            count = count_parameters(attached)
            fraction = count / count_parameters(teacher.denoiser)
            result = DistillResult(attached, job.directory, count, fraction, loss, explained, phases.seconds, memory, passes)
            if accelerator.is_main_process:
                about = {"source": states.manifest.plan["source"], "init": settings["init"], "train": job.train_config.to_dict()}
                _write(job, result, about | ({"memory": str(memory["way"])} if memory else {}))
            accelerator.wait_for_everyone()
        except BaseException:
            _unload(teacher)
            raise
    return result


def _unload(teacher: Teacher) -> None:
    """Remove the adapter, and those of a pipeline's other denoisers."""
    unload(teacher)
    unload(teacher.owner)


def _settings(job: Job, adapter: Adapter, states: Trajectories, processes: int) -> dict[str, Any]:
    """What a checkpoint must match to be continued: settings, states and targets, but not how memory and time are saved, nor
    when something is written."""
    train = job.train_config.to_dict()
    for name in ("micro_batch_size", "cuda_graph", "checkpoint_every", "log_every"):
        train.pop(name)
    return {
        "adapter": adapter.config.to_dict(),
        "init": None if job.init is None else fingerprint(adapter.state_dict()),
        "train": train,
        "plan": states.manifest.plan_id,
        "processes": processes,
    }


def _train(
    job: Job, states: Trajectories, settings: dict[str, Any], accelerator: Accelerator, residency: Residency
) -> tuple[float, dict[str, Any] | None, dict[str, Any]]:
    """The last loss; how memory was saved, if that was asked for; how passes ran."""
    economy = Economy(job.teacher.denoiser, _choice(job, states, accelerator.device, residency.short), residency.card)
    if job.memory == "auto" and accelerator.is_main_process:
        _say(job, f"memory='auto': {economy.reason}")
    adapter = require_attachment(job.teacher).adapter
    with economy, Passes.of(job.train_config, accelerator, job.teacher.denoiser, adapter, residency.short) as passes:
        loss = train(
            job.teacher,
            states,
            job.train_config,
            job.directory,
            accelerator,
            run=settings,
            resume=job.resume,
            tensorboard=job.tensorboard,
            progress=job.progress,
            economy=economy,
            passes=passes,
            host=residency.short,
            validate=_validation(job, economy, residency) if job.validate_every else None,
            validate_every=job.validate_every,
        )
    if job.memory is None and job.base_weights is None:
        return loss, None, passes.info()
    way = economy.way
    streamed = bool(residency.why_streamed)
    memory = {"memory": job.memory, "way": str(way), **asdict(way), "reason": economy.reason, "streamed": streamed}
    return loss, memory, passes.info()


def _choice(job: Job, states: Trajectories, device: torch.device, short: bool) -> Choice:
    """On the CPU nothing has to be saved: "auto" is the first way."""
    config = job.train_config
    ways = ways_of(job.memory, job.base_weights, config.micro_batch_size, has_blocks(job.teacher.denoiser))
    if job.memory != "auto":
        return Choice(ways, "as asked for")
    spec, batch, denoiser = job.teacher.spec, states.largest(), job.teacher.denoiser
    arguments = {**batch.conditions, **batch.constants}
    arguments.pop(PART, None)  # not an argument of the denoiser
    inputs = {spec.sample: batch.sample.to(job.teacher.dtype), spec.timestep: batch.timestep, **arguments}
    adapter = require_attachment(denoiser).adapter
    resident = sum(p.nbytes for module in (denoiser, adapter) for p in module.parameters() if p.device.type == device.type)
    budget = budget_on(device, resident)
    if budget is None:
        return Choice(ways, f"{ways[0]}, for there is no card to fit")
    estimate = estimator(job.teacher, inputs, "host" if short else "adamw")
    return choose(ways, budget, config.batch_size // PartialState().num_processes, estimate)


def _say(job: Job, text: str) -> None:
    (tqdm.write if job.progress else logger.info)(text)


def _states(job: Job, progress: bool) -> Trajectories:
    if isinstance(job.trajectories, Trajectories):
        return job.trajectories
    return collect(
        job.teacher,
        job.table,
        job.directory / "trajectories",
        trajectories=job.trajectories,
        guidance_range=job.config.guidance_range,
        steps=job.sampling_steps,
        keep=job.keep_steps,
        source=job.source,
        data=job.data,
        shard_size=job.shard_size,
        seed=job.seed,
        dtype=job.store_dtype,
        progress=progress,
    )


def _explained(job: Job) -> Explained:
    return _measured(job, _scales(*job.config.guidance_range, job.teacher.guides_above), job.seed + 1)


def _calibration(job: Job) -> Calibration:
    """The calibration of the adapter as trained, on held-out trajectories other than those of validation, up to the highest ω."""
    low, high = job.config.guidance_range
    scales = sorted({*_scales(low, high, job.teacher.guides_above), high})
    return calibration_of(_measured(job, tuple(scales), job.seed + 2), (low, high))


def _measured(job: Job, scales: tuple[float, ...], seed: int) -> Explained:
    return guidance_explained(
        job.teacher, _cycled(job.table, job.validation), scales=scales, steps=_middle(job.sampling_steps), seed=seed
    )


def _forget_validation(folder: Path) -> None:
    """Delete what a previous run wrote during training."""
    for ending in ("json", "png"):
        for path in folder.glob(f"step-*.{ending}"):
            path.unlink()


def _validation(job: Job, economy: Economy, residency: Residency) -> Callable[[int], float]:
    """Measures the adapter as it stands after a step, writes that and a picture, and returns guidance_explained."""

    def validate(step: int) -> float:
        name = job.directory / VALIDATION_NAME / f"step-{step:06d}"
        with torch.random.fork_rng(), economy.base_restored():
            explained = residency.run("validation", partial(_explained, job))
            write_json(name.with_suffix(".json"), without_nan({"step": step, **explained.to_dict()}))
            _picture(job, name.with_suffix(".png"), residency)
        return explained.mean

    return validate


def draw_samples(job: Job) -> None:
    """Write samples.png. Leaves no adapter when something is raised."""
    try:
        residency = _residency(job, PartialState().device)
        with residency.kept():
            _picture(job, job.directory / PICTURE_NAME, residency)
    except BaseException:
        _unload(job.teacher)
        raise


def _picture(job: Job, path: Path, residency: Residency) -> None:
    """Draw unguided, CFG and AGD from the same noise. Warns if they cannot be drawn: nothing else depends on them."""
    try:
        residency.run("drawing samples", partial(_draw, job, path, residency.short))
    except Exception as error:
        path.unlink(missing_ok=True)  # it would be an earlier run's
        warn(f"{path} was not drawn: {described(error)}")


def _draw(job: Job, path: Path, short: bool) -> None:
    """short: whether memory is."""
    omega, steps = sum(job.config.guidance_range) / 2, _middle(job.sampling_steps)
    with tiled(decoder_of(job.teacher.owner)) if short else nullcontext():
        picture = preview(job.teacher, job.table, omega, steps, job.seed + 1)
    if picture is not None:
        with replacing(path) as partial:
            picture.save(partial, "PNG")


# what decides the noise in a state at a given t; shifts of a flow's schedule only decide which t there are
_OF_NOISE = {"num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}


def require_fit(states: Trajectories, job: Job) -> None:
    """Raises: ValueError when trajectories collected before do not fit this run. Warns: when the weights, the noise schedule,
    the conditions or the embedding of the null condition differ."""
    found, where = states.manifest.plan, states.manifest.directory
    expected = as_json({**identity(job.teacher), "guidance_range": job.config.guidance_range})
    decide = {"sample_shape", "guided_channels", "prediction_type", "guidance", "null_condition", "guidance_range"}
    ours, theirs = ({name: plan[name] for name in decide} | {"model.class": plan["model"]["class"]} for plan in (expected, found))
    embeddings = [name for name, value in job.teacher.null_condition.items() if value.is_floating_point()]
    nulls = [{name: found.pop(name, None) for name in embeddings} for found in (ours["null_condition"], theirs["null_condition"])]
    if differing := differences(ours, theirs):
        raise ValueError(f"{where} holds trajectories that do not fit this run ({differing})")
    if differing := differences(*nulls):
        warn(f"{where} was collected with another null condition ({differing}), or with the same in another precision")
    if found["model"]["hash"] != expected["model"]["hash"]:
        warn(f"{where} was collected from other weights than this {ours['model.class']} has")
    both = _OF_NOISE & expected["scheduler"].keys() & found["scheduler"].keys()
    if differing := differences(*({name: plan["scheduler"][name] for name in both} for plan in (expected, found))):
        warn(f"{where} was collected with another schedule of noise ({differing})")
    if differing := differences(job.teacher.fingerprints(job.table), found["conditions"]):
        warn(f"{where} was collected from other conditions than those given ({differing}), which are for validation alone")


def _write(job: Job, result: DistillResult, about: dict[str, Any]) -> None:
    teacher = job.teacher
    of_teacher = {"teacher": teacher.guidance_name, "scheduler": type(teacher.scheduler).__name__}
    explained = result.explained.mean if result.explained else None
    save(teacher, result.output_dir, about=without_nan({**of_teacher, **job.about, **about, "guidance_explained": explained}))
    found = {
        "parameters": result.parameters,
        "fraction": result.fraction,
        "loss": result.loss,
        "guidance_explained": result.explained.to_dict() if result.explained else None,
        "seconds": result.seconds,
        **({"memory": result.memory} if result.memory else {}),
        "passes": result.passes,
    }
    write_json(result.output_dir / RESULT_NAME, without_nan(found))


def _cycled(table: Conditions, count: int) -> dict[str, Tensor]:
    rows = torch.arange(count) % len(next(iter(table.values())))
    return {name: value[rows] for name, value in table.items()}


def _scales(low: float, high: float, above: float) -> tuple[float, ...]:
    """The scales fidelity is reported at, within the trained range and where there is guidance."""
    inside = tuple(omega for omega in SCALES if low <= omega <= high and omega > above)
    return inside or ((low + high) / 2,)


def _middle(steps: int | tuple[int, int]) -> int:
    return steps if isinstance(steps, int) else sum(steps) // 2
