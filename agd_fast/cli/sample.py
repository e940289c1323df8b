"""agd-fast sample: makes a picture with one forward pass per step."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import (
    AdapterArgument,
    DtypeOption,
    InputsOption,
    LabelsOption,
    ModelOption,
    QuietOption,
    SeedOption,
    StepsOption,
)
from agd_fast.cli.reading import find_adapter, load_model, parse_call, parse_labels, require_one, require_pipeline

if TYPE_CHECKING:
    from torch import Tensor


def sample(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("samples.png"),
    model: ModelOption = "digits",
    labels: LabelsOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt, for a text pipeline; repeat the option for several.")] = None,
    inputs: InputsOption = None,
    call: Annotated[str | None, typer.Option(help="Further arguments of the pipeline's call, as JSON.")] = None,
    dtype: DtypeOption = "float32",
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    steps: StepsOption = 25,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also show unguided and two-pass CFG samples from the same noise.")
    ] = False,
    optimize: Annotated[bool, typer.Option("--optimize", help="Sample with the engine.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Sample with one forward pass per step and write a picture."""
    import torch

    from agd_fast.attaching import own_call
    from agd_fast.evaluation.evaluate import arm_sampler
    from agd_fast.pipelines import ARMS
    from agd_fast.reporting.pictures import NAMES, save_grid
    from agd_fast.teacher import as_teacher

    if output.suffix != ".png":
        raise typer.BadParameter(f"expected a file name that ends in .png, found {output}")
    require_pipeline(model, prompt=prompt or None, inputs=inputs, call=call)
    require_one(prompt=prompt or None, inputs=inputs, labels=labels)
    given = {"prompt": prompt} if inputs is None else agd.datasets.read_inputs(inputs)
    classes, arguments = torch.tensor(parse_labels(labels or "0-9")), parse_call(call or "{}")
    folder = find_adapter(adapter)
    pipeline = load_model(model, dtype)
    if optimize:
        agd.optimize(pipeline)
    arms = ARMS if compare else ("agd",)
    if prompt or inputs:
        count = _sample_inputs(agd.load(pipeline, folder), given, arguments, guidance, steps, seed, arms, output)
    else:
        teacher = as_teacher(pipeline)
        if teacher is not pipeline and "class_labels" not in inspect.signature(own_call(pipeline)).parameters:
            raise typer.BadParameter(f"a text pipeline expects --prompt or --inputs; found neither for {type(pipeline).__name__}")
        agd.load(teacher, folder)
        noise = torch.randn(len(classes), *teacher.sample_shape, generator=torch.Generator().manual_seed(seed))
        omega = guidance + teacher.spec.omega_offset
        rows = {}
        for arm in arms:
            run = arm_sampler(teacher, arm, classes, noise, omega, steps, batch_size=64, progress=not quiet)
            rows[NAMES[arm]] = _to_images(pipeline, run())
        save_grid(output, rows, [str(label) for label in classes.tolist()])
        count = len(classes)
    console.print(f"{count} samples at guidance scale {guidance:g} in {steps} steps: {output}", markup=False)


def _sample_inputs(
    pipe: Any, inputs: Any, call: dict[str, Any], guidance: float, steps: int, seed: int, arms: Any, output: Path
) -> int:
    """Writes a grid: one row per arm, one column per row of the inputs."""
    from agd_fast.distillation.preview import grid_of, pictures
    from agd_fast.files import replacing
    from agd_fast.pipelines import PipelineTeacher

    teacher = PipelineTeacher.of(pipe, inputs=inputs, call=call)
    rows = [pictures(teacher, arm, guidance, steps, seed, len(teacher)) for arm in arms]
    if not all(rows):
        raise ValueError(f"expected a pipeline that makes pictures, found a {type(pipe).__name__} whose output is none")
    with replacing(output) as partial:
        grid_of(rows).save(partial, "PNG")
    return len(teacher)


def _to_images(pipeline: Any, samples: Tensor) -> Tensor:
    """Samples in [−1, 1], through the pipeline's VAE where it has one."""
    import torch

    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return samples
    with torch.inference_mode():
        return vae.decode(samples / vae.config.scaling_factor).sample
