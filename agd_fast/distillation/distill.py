"""`distill`: from a frozen model to a trained adapter in one call."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agd_fast.adapters import Adapter, AdapterConfig, count_parameters, for_backbone
from agd_fast.attaching import attach, require_attachment, unload
from agd_fast.distillation.config import TrainConfig, learning_rate_of
from agd_fast.distillation.presets import find_preset
from agd_fast.distillation.train import make_accelerator, train
from agd_fast.evaluation.explained import SCALES, Explained, guidance_explained
from agd_fast.files import differences, fingerprint, write_json
from agd_fast.freezing import frozen
from agd_fast.spec import DenoiserSpec
from agd_fast.storage import load, read_config, save
from agd_fast.teacher import Conditions, Teacher, as_teacher
from agd_fast.trajectories import Source, Trajectories, collect

RESULT_NAME = "distill.json"


@dataclass(frozen=True)
class DistillResult:
    """What `distill` made.

    adapter: attached to the teacher. output_dir: holds it on disk. parameters, fraction: its size, also as a share of the
    base's parameters. loss: the last logged. explained: guidance_explained on held-out trajectories (None if not asked for).
    seconds: by phase, of this call.
    """

    adapter: Adapter = field(repr=False)
    output_dir: Path
    parameters: int
    fraction: float
    loss: float
    explained: Explained | None
    seconds: dict[str, float]


def distill(
    model: Any,
    *,
    output_dir: str | os.PathLike[str],
    class_labels: Sequence[int] | Tensor | None = None,
    conditions: Conditions | None = None,
    null_condition: Conditions | None = None,
    guidance_range: tuple[float, float] | None = None,
    preset: str | None = None,
    adapter: AdapterConfig | None = None,
    init: str | os.PathLike[str] | None = None,
    train_config: TrainConfig | None = None,
    trajectories: int | Trajectories | None = None,
    sampling_steps: int | tuple[int, int] | None = None,
    keep_steps: int | None = None,
    source: Source = "trajectories",
    data: tuple[Tensor, Tensor] | None = None,
    shard_size: int = 50,
    store_dtype: torch.dtype | None = None,
    scheduler: Any = None,
    spec: DenoiserSpec | None = None,
    validation: int = 50,
    seed: int = 0,
    resume: bool = True,
    tensorboard: bool = False,
    progress: bool = True,
) -> DistillResult:
    """Distil the guidance of a frozen model into an adapter (arXiv 2503.07274); leaves the adapter attached.

    model: a Teacher, a diffusers pipeline, or a denoiser with `scheduler`. Its weights do not change.
    class_labels, conditions: what to train on, as labels or as tensors by argument name, batch first; trajectories cycle
        through them. null_condition: the unconditional value where the spec has none (a text model's empty prompt).
    preset: name of settings that go together (`agd_fast.distillation.presets.PRESETS`), for all of the following that is None.
    guidance_range: (low, high) of the guidance scale, in the family's own convention; None takes that of `adapter` or `init`.
    adapter: kind and size. train_config: see TrainConfig.
    init: folder of a trained adapter to start from, instead of a fresh one that is zero; it decides `adapter`.
    trajectories: how many to collect into output_dir/trajectories, or ones collected before. sampling_steps, keep_steps,
        source, data, shard_size, store_dtype: see `agd_fast.trajectories.collect`. source="student" follows the adapter of
        `init`: one round of training on its own states.
    validation: held-out guided trajectories a scale for `guidance_explained`; 0 for none.
    resume: continue an interrupted run in output_dir; False trains anew on the trajectories there.

    Writes adapter.safetensors, adapter_config.json, distill.json, log.jsonl, checkpoint.safetensors and trajectories/.
    Raises: ValueError for a missing condition, an attached adapter, an `init` that does not fit, or an output_dir of another
    run; FloatingPointError when the loss becomes NaN; OSError when something cannot be written. The model is then without
    adapter again.
    """
    teacher = as_teacher(model, scheduler, spec=spec, null_condition=null_condition)
    table = teacher.conditions(class_labels, conditions)
    _require_conditional(teacher, table)
    settings = find_preset(preset)
    if adapter is None and preset is not None:
        adapter = settings.adapter
    train_config = train_config or settings.train
    trajectories = settings.trajectories if trajectories is None else trajectories
    sampling_steps = settings.sampling_steps if sampling_steps is None else sampling_steps
    keep_steps = settings.keep_steps if keep_steps is None else keep_steps
    directory = Path(output_dir)
    if init is None and source == "student":
        raise ValueError("source='student' expects init=..., the folder of a trained adapter that the states follow; found None")
    if init is not None and directory.resolve() == Path(init).resolve():
        raise ValueError(f"expected an output_dir other than init, found {init} for both")
    config = for_backbone(_adapter_config(adapter, guidance_range, teacher.spec.omega_offset, init), teacher.spec)
    low, high = config.guidance_range
    learning_rate = learning_rate_of(config.kinds) if train_config.learning_rate is None else train_config.learning_rate
    order = seed if train_config.seed is None else train_config.seed
    train_config = replace(train_config, learning_rate=learning_rate, seed=order)
    if teacher.dtype is torch.float16 and train_config.mixed_precision != "fp16":
        raise ValueError(
            "a float16 base loses small gradients unscaled: expected mixed_precision='fp16', which scales the loss, "
            f"or a bfloat16 or float32 base; found mixed_precision={train_config.mixed_precision!r}"
        )
    if validation < 0:
        raise ValueError(f"validation must be a number of trajectories or 0, found {validation}")
    accelerator = make_accelerator(train_config.mixed_precision)
    with torch.random.fork_rng(), frozen(teacher.denoiser):
        torch.manual_seed(seed)
        attached = attach(teacher, config) if init is None else require_attachment(load(teacher, init)).adapter
        try:
            teacher.denoiser.to(accelerator.device)
            attached.to(accelerator.device)
            marks = [time.perf_counter()]
            if isinstance(trajectories, int):
                with accelerator.main_process_first():
                    states = collect(
                        teacher,
                        table,
                        directory / "trajectories",
                        trajectories=trajectories,
                        guidance_range=(low, high),
                        steps=sampling_steps,
                        keep=keep_steps,
                        source=source,
                        data=data,
                        shard_size=shard_size,
                        seed=seed,
                        dtype=store_dtype,
                        progress=progress and accelerator.is_main_process,
                    )
            else:
                states = trajectories
                _require_fit(states, teacher, (low, high))
            marks.append(time.perf_counter())
            run = {
                "adapter": attached.config.to_dict(),
                "init": None if init is None else fingerprint(attached.state_dict()),
                "train": train_config.to_dict(),
                "plan": states.manifest.plan_id,
                "processes": accelerator.num_processes,
            }
            loss = train(
                teacher,
                states,
                train_config,
                directory,
                accelerator,
                run=run,
                resume=resume,
                tensorboard=tensorboard,
                progress=progress,
            )
            marks.append(time.perf_counter())
            explained = None
            if validation:
                explained = guidance_explained(
                    teacher,
                    _cycled(table, validation),
                    scales=_scales(low, high),
                    steps=_middle(sampling_steps),
                    seed=seed + 1,
                )
            marks.append(time.perf_counter())
            seconds = dict(zip(("collect", "train", "validate"), (b - a for a, b in pairwise(marks)), strict=True))
            result = DistillResult(
                attached,
                directory,
                count_parameters(attached),
                count_parameters(attached) / count_parameters(teacher.denoiser),
                loss,
                explained,
                seconds,
            )
            if accelerator.is_main_process:
                about = {"source": states.manifest.plan["source"], "init": run["init"], "train": train_config.to_dict()}
                _write(teacher, result, about)
            accelerator.wait_for_everyone()
        except BaseException:
            unload(teacher)
            raise
    return result


def _adapter_config(
    adapter: AdapterConfig | None,
    guidance_range: tuple[float, float] | None,
    omega_offset: float,
    init: str | os.PathLike[str] | None,
) -> AdapterConfig:
    """The config as given, or that of `init`. Raises: ValueError naming each entry in which the two contradict each other."""
    given = {} if adapter is None else adapter.to_dict()
    if guidance_range is not None:
        given["guidance_range"] = [scale + omega_offset for scale in guidance_range]
    if init is None:
        return AdapterConfig.from_dict({**AdapterConfig().to_dict(), **given})
    found = read_config(Path(init))["adapter"]
    decided = {name: value for name, value in given.items() if value is not None}
    if differing := differences({**found, **decided}, found):
        raise ValueError(f"{init} holds another adapter than was asked for ({differing})")
    return AdapterConfig.from_dict(found)


def _require_conditional(teacher: Teacher, table: Conditions) -> None:
    """Raises: ValueError when the unconditional label is among what is to be distilled: guidance does not move it."""
    null = teacher.null(table)
    for condition in teacher.spec.adapted:
        value = table[condition.argument]
        if not value.is_floating_point() and (value == null[condition.argument]).any():
            raise ValueError(
                f"{condition.argument} holds the null label {int(null[condition.argument][0])}, which guidance does not move; "
                "expected labels of classes alone"
            )


def _require_fit(states: Trajectories, teacher: Teacher, guidance_range: tuple[float, float]) -> None:
    """Raises: ValueError when trajectories collected before do not fit this run. Warns: when the weights were others."""
    plan, where = states.manifest.plan, states.manifest.directory
    expected = {
        "model.class": type(teacher.denoiser).__name__,
        "prediction_type": teacher.prediction_type,
        "sample_shape": list(teacher.sample_shape),
        "guidance_range": list(guidance_range),
        "guidance": teacher.guidance_name,
    }
    found = {"model.class": plan["model"]["class"]} | {name: plan[name] for name in expected if name in plan}
    if differing := differences(expected, found):
        raise ValueError(f"{where} holds trajectories that do not fit this run ({differing})")
    if plan["model"]["hash"] != fingerprint(teacher.denoiser.state_dict()):
        warnings.warn(f"{where} was collected from other weights than this {expected['model.class']} has", stacklevel=3)


def _write(teacher: Teacher, result: DistillResult, about: dict[str, Any]) -> None:
    of_teacher = {"teacher": teacher.guidance_name, "scheduler": type(teacher.scheduler).__name__}
    explained = result.explained.mean if result.explained else None
    save(teacher, result.output_dir, about={**of_teacher, **about, "guidance_explained": explained})
    write_json(
        result.output_dir / RESULT_NAME,
        {
            "parameters": result.parameters,
            "fraction": result.fraction,
            "loss": result.loss,
            "guidance_explained": result.explained.to_dict() if result.explained else None,
            "seconds": result.seconds,
        },
    )


def _cycled(table: Conditions, count: int) -> dict[str, Tensor]:
    rows = torch.arange(count) % len(next(iter(table.values())))
    return {name: value[rows] for name, value in table.items()}


def _scales(low: float, high: float) -> tuple[float, ...]:
    """The scales fidelity is reported at, within the trained range."""
    inside = tuple(omega for omega in SCALES if low <= omega <= high)
    return inside or ((low + high) / 2,)


def _middle(steps: int | tuple[int, int]) -> int:
    return steps if isinstance(steps, int) else sum(steps) // 2
