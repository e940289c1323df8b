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

from agd_fast.adapters import Adapter, AdapterConfig, count_parameters
from agd_fast.attaching import attach, unload
from agd_fast.distillation.config import LEARNING_RATES, TrainConfig
from agd_fast.distillation.train import make_accelerator, train
from agd_fast.evaluation.explained import SCALES, Explained, guidance_explained
from agd_fast.files import differences, fingerprint, write_json
from agd_fast.freezing import frozen
from agd_fast.spec import DenoiserSpec
from agd_fast.storage import save
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
    guidance_range: tuple[float, float] = (1.0, 6.0),
    adapter: AdapterConfig | None = None,
    train_config: TrainConfig | None = None,
    trajectories: int | Trajectories = 400,
    sampling_steps: int | tuple[int, int] = (20, 30),
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
    """Distil classifier-free guidance of a frozen model into an adapter (arXiv 2503.07274); leaves the adapter attached.

    model: a Teacher, a diffusers pipeline, or a denoiser with `scheduler`. Its weights do not change.
    class_labels, conditions: what to train on, as labels or as tensors by argument name, batch first; trajectories cycle
        through them. null_condition: the unconditional value where the spec has none (a text model's empty prompt).
    guidance_range: (low, high) of the guidance scale, in the family's own convention.
    adapter: kind and size; its guidance_range is replaced by `guidance_range`. train_config: see TrainConfig.
    trajectories: how many to collect into output_dir/trajectories, or ones collected before. sampling_steps, keep_steps,
        source, data, shard_size, store_dtype: see `agd_fast.trajectories.collect`.
    validation: held-out guided trajectories a scale for `guidance_explained`; 0 for none.
    resume: continue an interrupted run in output_dir; False trains anew on the trajectories there.

    Writes adapter.safetensors, adapter_config.json, distill.json, log.jsonl, checkpoint.safetensors and trajectories/.
    Raises: ValueError for a missing condition, an attached adapter, or an output_dir of another run; FloatingPointError
    when the loss becomes NaN; OSError when something cannot be written. The model is then without adapter again.
    """
    teacher = as_teacher(model, scheduler, spec=spec, null_condition=null_condition)
    table = teacher.conditions(class_labels, conditions)
    _require_conditional(teacher, table)
    train_config = train_config or TrainConfig()
    low, high = (scale + teacher.spec.omega_offset for scale in guidance_range)
    config = replace(adapter or AdapterConfig(), guidance_range=(low, high))
    learning_rate = LEARNING_RATES[config.kind] if train_config.learning_rate is None else train_config.learning_rate
    order = seed if train_config.seed is None else train_config.seed
    train_config = replace(train_config, learning_rate=learning_rate, seed=order)
    if teacher.dtype is torch.float16 and train_config.mixed_precision != "fp16":
        raise ValueError(
            "a float16 base loses small gradients unscaled: expected mixed_precision='fp16', which scales the loss, "
            f"or a bfloat16 or float32 base; found mixed_precision={train_config.mixed_precision!r}"
        )
    if validation < 0:
        raise ValueError(f"validation must be a number of trajectories or 0, found {validation}")
    directory = Path(output_dir)
    accelerator = make_accelerator(train_config.mixed_precision)
    with torch.random.fork_rng(), frozen(teacher.denoiser):
        torch.manual_seed(seed)
        attached = attach(teacher, config)
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
                _write(teacher, result, train_config)
            accelerator.wait_for_everyone()
        except BaseException:
            unload(teacher)
            raise
    return result


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
    }
    found = {"model.class": plan["model"]["class"]} | {name: plan[name] for name in expected if name in plan}
    if differing := differences(expected, found):
        raise ValueError(f"{where} holds trajectories that do not fit this run ({differing})")
    if plan["model"]["hash"] != fingerprint(teacher.denoiser.state_dict()):
        warnings.warn(f"{where} was collected from other weights than this {expected['model.class']} has", stacklevel=3)


def _write(teacher: Teacher, result: DistillResult, train_config: TrainConfig) -> None:
    about = {
        "teacher": "classifier-free guidance",
        "scheduler": type(teacher.scheduler).__name__,
        "train": train_config.to_dict(),
        "guidance_explained": result.explained.mean if result.explained else None,
    }
    save(teacher, result.output_dir, about=about)
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
