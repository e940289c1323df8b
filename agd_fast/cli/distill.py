"""agd-fast distill: distils the guidance of a model into an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import DtypeOption, InputsOption, LabelsOption, ModelOption, OutputOption, QuietOption, SeedOption
from agd_fast.cli.reading import find_adapter, given, load_model, parse_call, parse_labels, require_one, require_pipeline

PRESETS = "small, dit, sd15, sd21, sdxl, paper-dit, paper-sd21, paper-sdxl"


def distill(
    output: OutputOption = Path("runs/distill"),
    model: ModelOption = "digits",
    labels: LabelsOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt per line.", show_default="bundled captions, for a text pipeline"),
    ] = None,
    inputs: InputsOption = None,
    call: Annotated[
        str | None,
        typer.Option(help='Further arguments of the pipeline\'s call, as JSON, e.g. \'{"height": 768, "width": 768}\'.'),
    ] = None,
    dtype: DtypeOption = "float32",
    preset: Annotated[str | None, typer.Option(help=f"Settings that go together: {PRESETS}.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="Kind of adapter: modulation, gated_lora, cross_attention, offset, or several joined by '+'.",
            show_default="depends on the backbone",
        ),
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the adapter; default: the largest within --max-fraction.")] = None,
    max_fraction: Annotated[
        float | None,
        typer.Option(help="Largest size of the adapter, as a fraction of the base's parameters.", show_default="0.05"),
    ] = None,
    guidance: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest guidance scale to train on.", show_default="1 6, or 1 12 for prompts or inputs"),
    ] = None,
    init: Annotated[str | None, typer.Option(help="Folder or Hub repo of a trained adapter to start from.")] = None,
    source: Annotated[
        str, typer.Option(help="Whose states to train on: trajectories (guided), or student (the adapter of --init).")
    ] = "trajectories",
    trajectories: Annotated[
        int | None, typer.Option(min=1, help="Number of trajectories to collect.", show_default="400")
    ] = None,
    sampling_steps: Annotated[
        tuple[int, int] | None, typer.Option(help="Lowest and highest number of steps of a trajectory.", show_default="20 30")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of training steps.", show_default="800")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="States per training step.", show_default="128")] = None,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Most states in a forward pass.", show_default="all, or what fits with --memory auto"),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            help="What is kept for the backward pass: exact, 8bit, 4bit, recompute, blocks, or auto (the first that fits)."
        ),
    ] = None,
    base_weights: Annotated[str | None, typer.Option(help="Keep the frozen weights as int8 or nf4 while training.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; the default depends on the kind.")] = None,
    ema: Annotated[float | None, typer.Option(help="Save an average of the weights with this decay, e.g. 0.999.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="Mixed precision: no, fp16 or bf16.", show_default="no")] = None,
    validation: Annotated[
        int | None,
        typer.Option(min=0, help="Held-out trajectories per scale; 0 for none.", show_default="50, or 8 for a pipeline"),
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Also measure, and draw a picture, every so many steps.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Afterwards, measure how much weaker the adapter guides, and make up for it.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew instead of resuming the run in OUTPUT.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Distil the guidance of a model into an adapter. Resumes an interrupted run."""
    from agd_fast.distillation.distill import require_settings
    from agd_fast.distillation.presets import find_preset

    require_pipeline(model, prompts=prompts, inputs=inputs, call=call)
    require_one(prompts=prompts, inputs=inputs, labels=labels)
    if sampling_steps is not None and sampling_steps[0] > sampling_steps[1]:
        raise typer.BadParameter(f"expected --sampling-steps LOWEST HIGHEST, found {sampling_steps[0]} {sampling_steps[1]}")
    preset_settings = find_preset(preset)
    of_training = {
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "ema": ema,
        "mixed_precision": mixed_precision,
    }
    adapter = given({"kind": kind, "hidden": hidden, "max_fraction": max_fraction})
    replace(preset_settings.adapter, **adapter)  # or raises
    settings: dict[str, Any] = {
        "output_dir": output,
        "guidance_range": guidance,
        "init": None if init is None else find_adapter(init),
        "source": source,
        "validation": validation,
        "validate_every": validate_every,
        "calibrate": calibrate,
        "memory": memory,
        "base_weights": base_weights,
        "seed": seed,
    }
    require_settings(**settings)
    settings |= {
        "class_labels": None if labels is None else parse_labels(labels),
        "prompts": None if prompts is None else agd.datasets.read_prompts(prompts),
        "inputs": None if inputs is None else agd.datasets.read_inputs(inputs),
        "call": None if call is None else parse_call(call),
        "adapter": adapter,
        "train_config": replace(preset_settings.train, **given(of_training)),
    }
    result = agd.distill(
        load_model(model, dtype, place=memory is None),
        **settings,
        preset=preset,
        trajectories=trajectories,
        sampling_steps=sampling_steps,
        resume=not fresh,
        tensorboard=tensorboard,
        progress=not quiet,
    )
    for found in (result, *result.others.values()):
        measured = found.explained
        explained = "" if measured is None else f" explain {measured.mean:.1%} of the guidance, strength {measured.strength:.2f}"
        console.print(
            f"{found.parameters:,} parameters ({found.fraction:.1%} of the base){explained}; written to {found.output_dir}",
            markup=False,
        )
