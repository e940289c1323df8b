"""`distill`: from a frozen model to a trained adapter in one call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from agd_fast.adapters import AdapterConfig, for_backbone
from agd_fast.checking import number_range, require_seed, require_whole
from agd_fast.distillation.config import TrainConfig, learning_rate_of
from agd_fast.distillation.job import DistillResult, Job, draw_samples, require_fit, run
from agd_fast.distillation.presets import find_preset
from agd_fast.distillation.teachers import Prompts, teachers_of
from agd_fast.distillation.train import make_accelerator
from agd_fast.files import differences
from agd_fast.locking import only_writer
from agd_fast.memory.blocks import has_blocks
from agd_fast.memory.choose import Memory, ways_of
from agd_fast.memory.weight_codes import Kind
from agd_fast.sources import resolve
from agd_fast.spec import DenoiserSpec
from agd_fast.storage import read_config
from agd_fast.teacher import Conditions
from agd_fast.trajectories import Source, Trajectories


def distill(
    model: Any,
    *,
    output_dir: str | os.PathLike[str],
    prompts: Prompts | None = None,
    inputs: Mapping[str, Sequence[Any] | Tensor] | None = None,
    class_labels: Sequence[int] | Tensor | None = None,
    conditions: Conditions | None = None,
    null_condition: Conditions | None = None,
    call: Mapping[str, Any] | None = None,
    teacher: Any = None,
    guidance_range: tuple[float, float] | None = None,
    preset: str | None = None,
    adapter: AdapterConfig | Mapping[str, Any] | None = None,
    init: str | os.PathLike[str] | None = None,
    train_config: TrainConfig | None = None,
    trajectories: int | Trajectories | None = None,
    sampling_steps: int | tuple[int, int] | None = None,
    keep_steps: int | None = None,
    source: Source = "trajectories",
    data: tuple[Tensor, Tensor] | None = None,
    shard_size: int | None = None,
    store_dtype: torch.dtype | None = None,
    scheduler: Any = None,
    spec: DenoiserSpec | None = None,
    validation: int | None = None,
    validate_every: int | None = None,
    calibrate: bool = False,
    memory: Memory | None = None,
    base_weights: Kind | None = None,
    seed: int = 0,
    resume: bool = True,
    tensorboard: bool = False,
    progress: bool = True,
) -> DistillResult:
    """Distil the guidance of a frozen model into an adapter (arXiv 2503.07274), and leave the adapter attached.

    model: a diffusers pipeline, a Teacher, or a denoiser with `scheduler`. Its weights do not change. A pipeline's own runs
        decide what the guided prediction is; afterwards, its call makes one forward pass per step.
    prompts: what a text pipeline is trained on: a list, or a file with one prompt per line. None takes the captions that ship
        with the package (`agd_fast.datasets.captions`).
    inputs: instead of prompts, the rows of any arguments of the pipeline's call, by name, such as {"prompt_embeds": tensor}.
    call: further arguments of the pipeline's call: height, width, negative_prompt, ….
    class_labels, conditions: what a class-conditional model, a Teacher or a denoiser is trained on: labels (None takes all), or
        tensors by argument name, batch first. Trajectories cycle through the rows, as they do through prompts and inputs.
    null_condition: the unconditional value, if the spec has none.
    teacher: a guider from diffusers.guiders, whose rule is learnt in place of the pipeline's own.
    guidance_range: (low, high) of the guidance scale, in the model family's own convention. None takes the range of `adapter` or
        `init`, else ω from 1 to 6, or 1 to 12 for a pipeline that is given prompts or inputs, beginning no lower than where the
        pipeline guides at all.
    preset: name of a group of settings (`agd_fast.distillation.presets.PRESETS`), used for whatever of the following is None.
    adapter: kind and size of the adapter. A mapping sets some entries of an AdapterConfig by name and leaves the others as they
        would be without it.
    train_config: see TrainConfig.
    init: folder or Hub repo of a trained adapter to start from, instead of a new one that is zero; it decides `adapter`. A
        calibration of it is left behind.
    trajectories: how many to collect into output_dir/trajectories, or trajectories that were collected before.
    sampling_steps, keep_steps, source, data, shard_size, store_dtype: see `agd_fast.trajectories.collect`. source="student"
        follows the adapter of `init`: one round of training on states that it visits itself. A pipeline runs shard_size samples
        at once, all at one scale.
    validation: number of held-out trajectories per scale for `guidance_explained`: guided trajectories of the same inputs from
        other noise. 0 turns it off; None takes 50, or 8 for a pipeline.
    validate_every: also measure, and draw a picture, after every so many steps, into output_dir/validation.
    calibrate: after training, measure on `validation` further held-out trajectories how much weaker than the teacher the adapter
        guides, over scales and timesteps, and have it asked for that much more, up to 1.5 times and within guidance_range:
        towards the top of the range there is nothing left to ask for. Pictures are then guided about as strongly as the
        teacher's at the same scale, while a little less is explained; without it, guidance is somewhat weaker. What
        `validate_every` measures is not calibrated.
    memory: what a forward pass keeps for its backward pass (see `agd_fast.frozen_backward`, `agd_fast.estimate_memory`). None is
        plain autograd.
        - "exact" keeps what is needed, not rounded; "8bit", "4bit" and "recompute" keep less.
        - "blocks" is gradient checkpointing with 8 bits inside a block; it mostly keeps the least.
        - "auto" takes the first of these that fits the card; as a last resort, with the base in int8. On the CPU it is "exact".
        With all of these but "auto", and with "auto" if the card is small for the model, memory is saved elsewhere too. A model
        is on the card only for its own forward passes and then goes back to where it was. Guidance is two forward passes of one
        sample each. The optimizer's moments lie in host memory. If a model does not fit beside a forward pass, states, validation
        and pictures are made with weights that stay in host memory and come to the card one layer at a time: slower, but the same
        to the last bit.
    base_weights: "int8" or "nf4" keeps the frozen weights as codes while training (`agd_fast.memory.base_weights`), with the
        originals in host memory. States, validation and the model that you get back use the original weights.
    resume: continue an interrupted run in output_dir. The settings must be the same, except for memory, base_weights, the number
        of states in a forward pass, TrainConfig.cuda_graph, how often logs and checkpoints are written, and calibrate: a run that
        is finished is calibrated, or loses its calibration, without being trained again. False trains anew on the trajectories
        that are there.

    Writes adapter.safetensors, adapter_config.json, distill.json, log.jsonl, checkpoint.safetensors, samples.png and
    trajectories/; for a pipeline's further denoisers, the same in folders of their names.
    Raises: ValueError for a missing condition, an attached adapter, an `init` that does not fit, or an output_dir of another run;
    TypeError for an unknown model or guider; FloatingPointError if a state is not finite or the loss becomes NaN; OSError if
    something cannot be written, or another process is writing to output_dir; torch.OutOfMemoryError naming what takes less
    memory, after "auto" has tried one more way. The model then has no adapter again. Warns: if a picture cannot be drawn, or if
    `trajectories` are of other weights, noise or conditions.
    """
    directory = Path(output_dir)
    init = None if init is None else resolve(init)
    settings = find_preset(preset)
    chosen = {**({} if settings.adapter == AdapterConfig() else settings.adapter.to_dict()), **_entries(adapter)}
    require_settings(
        output_dir=directory,
        guidance_range=guidance_range,
        init=init,
        source=source,
        validation=validation,
        validate_every=validate_every,
        calibrate=calibrate,
        memory=memory,
        base_weights=base_weights,
        seed=seed,
    )
    teachers = teachers_of(
        model,
        prompts=prompts,
        inputs=inputs,
        class_labels=class_labels,
        conditions=conditions,
        null_condition=null_condition,
        call=call,
        guider=teacher,
        scheduler=scheduler,
        spec=spec,
    )
    if len(teachers) > 1 and isinstance(trajectories, Trajectories):
        raise ValueError(f"expected a number of trajectories for a pipeline's {len(teachers)} denoisers, found collected ones")
    jobs = []
    for index, (name, one, table) in enumerate(teachers):
        ways_of(memory, base_weights, None, has_blocks(one.denoiser))  # "blocks" may be missing
        folder = directory if index == 0 else directory / name
        of_init = init if init is None or index == 0 else init / name
        config = _adapter_config(chosen, guidance_range, one.spec.omega_offset, of_init)
        if "identity_at_one" not in chosen and init is None:
            config = replace(config, identity_at_one=one.gives_cond_at_one)
        if guidance_range is None and config.guidance_range == AdapterConfig().guidance_range:  # nobody chose it
            low, high = one.guidance_range if "guidance_range" not in chosen and init is None else config.guidance_range
            config = replace(config, guidance_range=(max(low, one.guides_above), high))
        negative = (call or {}).get("negative_prompt")
        if init is None and isinstance(negative, str):
            config = replace(config, negative_prompt=negative)
        config = for_backbone(config, one.spec)
        jobs.append(
            Job(
                teacher=one,
                table=table,
                directory=folder,
                config=config,
                init=of_init,
                train_config=_train_config(train_config or settings.train, config, one.dtype, seed),
                trajectories=settings.trajectories if trajectories is None else trajectories,
                sampling_steps=settings.sampling_steps if sampling_steps is None else sampling_steps,
                keep_steps=settings.keep_steps if keep_steps is None else keep_steps,
                source=source,
                data=data,
                shard_size=one.run_size if shard_size is None else shard_size,
                store_dtype=store_dtype,
                validation=one.validation_runs if validation is None else validation,
                validate_every=validate_every,
                seed=seed,
                resume=resume,
                tensorboard=tensorboard,
                progress=progress,
                about=one.about,
                memory=memory,
                base_weights=base_weights,
                calibrate=calibrate,
            )
        )
    if isinstance(trajectories, Trajectories):
        require_fit(trajectories, jobs[0])
    is_main = make_accelerator(jobs[0].train_config.mixed_precision).is_main_process
    with only_writer(directory):
        results = {name: run(job) for (name, _, _), job in zip(teachers, jobs, strict=True)}
        if jobs[0].validation and is_main:
            draw_samples(jobs[0])  # once every denoiser of a pipeline has its adapter
    first, *others = results
    return replace(results[first], others={name: results[name] for name in others})


def require_settings(
    *,
    output_dir: Path,
    guidance_range: tuple[float, float] | None,
    init: Path | None,
    source: Source,
    validation: int | None,
    validate_every: int | None,
    calibrate: bool,
    memory: Memory | None,
    base_weights: Kind | None,
    seed: int,
) -> None:
    """Check what can be checked of the arguments of `distill` without the model. Raises: ValueError."""
    if source not in get_args(Source):
        raise ValueError(f"source must be one of {get_args(Source)}, found {source!r}")
    if init is None and source == "student":
        raise ValueError("source='student' expects init=..., the folder of a trained adapter that the states follow; found None")
    if init is not None and output_dir.resolve() == init.resolve():
        raise ValueError(f"expected an output_dir other than init, found {init} for both")
    if guidance_range is not None:
        number_range("guidance_range", guidance_range)
    ways_of(memory, base_weights, None)
    require_seed(seed)
    require_whole(0, validation=validation)
    require_whole(validate_every=validate_every)
    for name, value in (("validate_every", validate_every), ("calibrate", calibrate)):
        if value and validation == 0:
            raise ValueError(f"{name}={value} expects held-out trajectories to measure on, found validation=0")


def _train_config(config: TrainConfig, adapter: AdapterConfig, dtype: torch.dtype, seed: int) -> TrainConfig:
    """The config with what was left open filled in. Raises: ValueError when the precision does not fit the base's."""
    if dtype is torch.float16 and config.mixed_precision != "fp16":
        raise ValueError(
            "a float16 base loses small gradients unscaled: expected mixed_precision='fp16', which scales the loss, "
            f"or a bfloat16 or float32 base; found mixed_precision={config.mixed_precision!r}"
        )
    learning_rate = learning_rate_of(adapter.kinds) if config.learning_rate is None else config.learning_rate
    return replace(config, learning_rate=learning_rate, seed=seed if config.seed is None else config.seed)


def _entries(adapter: AdapterConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of an AdapterConfig that were chosen."""
    return adapter.to_dict() if isinstance(adapter, AdapterConfig) else {**(adapter or {})}


def _adapter_config(
    chosen: Mapping[str, Any],
    guidance_range: tuple[float, float] | None,
    omega_offset: float,
    init: str | os.PathLike[str] | None,
) -> AdapterConfig:
    """The config as chosen, or that of `init`. Raises: ValueError naming each entry in which the two contradict each other."""
    given = {**chosen}
    if guidance_range is not None:
        given["guidance_range"] = [scale + omega_offset for scale in guidance_range]
    if init is None:
        return AdapterConfig.from_dict({**AdapterConfig().to_dict(), **given})
    found = AdapterConfig.from_dict(read_config(Path(init))["adapter"])
    decided = {name: value for name, value in given.items() if value is not None}
    asked = AdapterConfig.from_dict({**found.to_dict(), **decided})
    if differing := differences(asked.to_dict(), found.to_dict()):
        raise ValueError(f"{init} holds another adapter than was asked for ({differing})")
    return found
