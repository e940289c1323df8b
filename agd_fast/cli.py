"""The command line: agd-fast demo | distill | estimate | sample | evaluate | convert | push | info."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

import agd_fast as agd
from agd_fast.attaching import denoiser_of
from agd_fast.datasets import read_inputs
from agd_fast.distillation.presets import PRESETS, find_preset
from agd_fast.hub import resolve
from agd_fast.ops import kernels_info
from agd_fast.teacher import as_teacher

app = typer.Typer(
    help="One forward a step where classifier-free guidance needs two: Adapter Guidance Distillation for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True)

ModelOption = Annotated[
    str, typer.Option(help="'digits' (ships with the package), or a folder or Hub id of a diffusers pipeline.")
]
LabelsOption = Annotated[
    str | None, typer.Option(help="Class labels: '0-9', '3', '1,5,7' or a mix.", show_default="all of a class-conditional model")
]
InputsOption = Annotated[
    Path | None,
    typer.Option(help='File with one JSON object a line, e.g. {"prompt": "a red cat", "image": "cat.png"}, instead of prompts.'),
]
AdapterArgument = Annotated[str, typer.Argument(help="Folder with an adapter, or the id of a Hub repo.")]
DtypeOption = Annotated[str, typer.Option(help="Precision of the base: float32, bfloat16 or float16.")]
OutputOption = Annotated[Path, typer.Option(help="Folder to write to.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Sampling steps.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything random.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def demo(
    output: OutputOption = Path("runs/demo"),
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=20, help="Samples an arm for the measured distances.")] = 2000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew instead of continuing what OUTPUT holds.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Distil the digits teacher that ships, compare one pass with two, write a report with pictures."""
    from agd_fast.demo import run_demo
    from agd_fast.reporting.tables import print_evaluation

    done = run_demo(output, seed=seed, samples=samples, resume=not fresh, progress=not quiet)
    print_evaluation(done.result, done.bars, console)
    console.print(
        f"\n{done.report['seconds']['total']:.0f} s in all; pictures and tables: {output / 'report.html'}", markup=False
    )


@app.command()
def distill(
    output: OutputOption = Path("runs/distill"),
    model: ModelOption = "digits",
    labels: LabelsOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt a line.", show_default="captions that ship, for a text pipeline"),
    ] = None,
    inputs: InputsOption = None,
    call: Annotated[
        str | None,
        typer.Option(help='Further arguments of the pipeline\'s call as JSON, e.g. \'{"height": 768, "width": 768}\'.'),
    ] = None,
    dtype: DtypeOption = "float32",
    preset: Annotated[str | None, typer.Option(help=f"Settings that go together: {', '.join(PRESETS)}.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            help="modulation, gated_lora, cross_attention or offset; several joined by '+'.", show_default="the backbone's"
        ),
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the adapter; default: the largest within --max-fraction.")] = None,
    max_fraction: Annotated[
        float | None, typer.Option(help="Most parameters, as a share of the base's.", show_default="0.05")
    ] = None,
    guidance: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest guidance scale.", show_default="1 6")
    ] = None,
    init: Annotated[str | None, typer.Option(help="Folder or Hub repo of a trained adapter to start from.")] = None,
    source: Annotated[str, typer.Option(help="Whose states to train on: trajectories (guided), or student (of --init).")] = (
        "trajectories"
    ),
    trajectories: Annotated[int | None, typer.Option(min=1, help="Trajectories to collect.", show_default="400")] = None,
    sampling_steps: Annotated[
        tuple[int, int] | None, typer.Option(help="Lowest and highest number of their steps.", show_default="20 30")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default="800")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="States a training step.", show_default="128")] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Most states a forward.", show_default="the batch, or what fits with --memory auto")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="What is kept for backward: exact, 8bit, 4bit, recompute, blocks, or auto: the first that fits."),
    ] = None,
    base_weights: Annotated[str | None, typer.Option(help="Keep the frozen weights as int8 or nf4 while training.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate; default: by kind.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of an average of the weights, e.g. 0.999.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, fp16 or bf16.", show_default="no")] = None,
    validation: Annotated[
        int | None, typer.Option(min=0, help="Held-out trajectories a scale; 0 for none.", show_default="50, or 8 of a pipeline")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(min=1, help="Also measure and draw after every so many steps.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew instead of continuing what OUTPUT holds.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Distil guidance of a model into an adapter. Continues an interrupted run."""
    settings = find_preset(preset)
    of_training = {
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "learning_rate": learning_rate,
        "ema": ema,
        "mixed_precision": mixed_precision,
    }
    of_adapter = {"kind": kind, "hidden": hidden, "max_fraction": max_fraction}
    chosen = _given(of_adapter)
    result = agd.distill(
        load_model(model, dtype, place=memory is None),
        class_labels=None if labels is None else parse_labels(labels),
        prompts=prompts,
        inputs=None if inputs is None else read_inputs(inputs),
        call=None if call is None else parse_call(call),
        guidance_range=guidance,
        preset=preset,
        adapter=replace(settings.adapter, **chosen) if chosen else None,
        init=init,
        source=source,  # type: ignore[arg-type]
        train_config=replace(settings.train, **_given(of_training)),
        trajectories=trajectories,
        sampling_steps=sampling_steps,
        output_dir=output,
        validation=validation,
        validate_every=validate_every,
        memory=memory,  # type: ignore[arg-type]
        base_weights=base_weights,  # type: ignore[arg-type]
        seed=seed,
        resume=not fresh,
        tensorboard=tensorboard,
        progress=not quiet,
    )
    for found in (result, *result.others.values()):
        explained = "" if found.explained is None else f" explain {found.explained.mean:.1%} of the guidance"
        console.print(
            f"{found.parameters:,} parameters ({found.fraction:.1%} of the base){explained}; written to {found.output_dir}",
            markup=False,
        )


@app.command()
def estimate(
    model: Annotated[str, typer.Argument(help="'digits', or a folder or Hub id of a diffusers pipeline.")],
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Edge of the pictures in pixels.", show_default="the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="States a forward.")] = 1,
    kind: Annotated[str | None, typer.Option(help="Of adapter.", show_default="the backbone's")] = None,
    base_weights: Annotated[str | None, typer.Option(help="int8 or nf4, as in distill.")] = None,
    dtype: DtypeOption = "bfloat16",
) -> None:
    """How much memory distilling a model takes, by what is kept for backward. Needs no GPU."""
    found = agd.estimate_memory(
        load_model(model, dtype, place=False),
        resolution=resolution,
        batch_size=batch_size,
        adapter=None if kind is None else agd.AdapterConfig(kind),
        base_weights=base_weights,  # type: ignore[arg-type]
    )
    console.print(str(found), markup=False, highlight=False)


@app.command()
def sample(
    adapter: AdapterArgument,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("samples.png"),
    model: ModelOption = "digits",
    labels: LabelsOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt, for a text pipeline; give it again for several.")] = None,
    inputs: InputsOption = None,
    call: Annotated[str | None, typer.Option(help="Further arguments of the pipeline's call as JSON.")] = None,
    dtype: DtypeOption = "float32",
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 4.0,
    steps: StepsOption = 25,
    compare: Annotated[bool, typer.Option("--compare", help="Also show unguided and two-pass CFG from the same noise.")] = False,
    optimize: Annotated[bool, typer.Option("--optimize", help="Sample with the engine.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Sample with one forward a step and write a picture."""
    from agd_fast.evaluation.evaluate import arm_sampler
    from agd_fast.pipelines import ARMS
    from agd_fast.reporting.pictures import NAMES, save_grid

    if output.suffix != ".png":
        raise typer.BadParameter(f"expected a file name that ends in .png, found {output}")
    pipeline = load_model(model, dtype)
    if optimize:
        agd.optimize(pipeline)
    arms = ARMS if compare else ("agd",)
    if prompt and inputs:
        raise typer.BadParameter("expected --prompt or --inputs, found both")
    if prompt or inputs:
        given = {"prompt": prompt} if inputs is None else read_inputs(inputs)
        count = _sample_inputs(agd.load(pipeline, adapter), given, parse_call(call or "{}"), guidance, steps, seed, arms, output)
    else:
        teacher = agd.load(as_teacher(pipeline), adapter)
        classes = torch.tensor(parse_labels(labels or "0-9"))
        noise = torch.randn(len(classes), *teacher.sample_shape, generator=torch.Generator().manual_seed(seed))
        omega = guidance + teacher.spec.omega_offset
        rows = {}
        for arm in arms:
            run = arm_sampler(teacher, arm, classes, noise, omega, steps, batch_size=64, progress=not quiet)
            rows[NAMES[arm]] = to_images(pipeline, run())
        save_grid(output, rows, [str(label) for label in classes.tolist()])
        count = len(classes)
    console.print(f"{count} samples at guidance scale {guidance:g} in {steps} steps: {output}", markup=False)


def _sample_inputs(
    pipe: Any, inputs: Any, call: dict[str, Any], guidance: float, steps: int, seed: int, arms: Any, output: Path
) -> int:
    """One row an arm, one column a row of the inputs."""
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


@app.command()
def evaluate(
    adapter: AdapterArgument,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="ADAPTER itself for digits, else runs/evaluate")
    ] = None,
    model: ModelOption = "digits",
    prompts: Annotated[
        Path | None, typer.Option(help="For a text pipeline: file with one prompt a line, none of which it was distilled on.")
    ] = None,
    inputs: InputsOption = None,
    labels: Annotated[str | None, typer.Option(help="For a class-conditional pipeline: labels, e.g. '0-9'.")] = None,
    call: Annotated[
        str | None, typer.Option(help="Further arguments of the pipeline's call as JSON, those that it was distilled with.")
    ] = None,
    dtype: DtypeOption = "float32",
    scales: Annotated[
        str | None, typer.Option(help="Guidance scales, e.g. '5,7.5'.", show_default="of a pipeline, the middle of its range")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="Of a pipeline's pictures also: lpips, clip, fid, or which of each, e.g. 'lpips=vgg,clip=FOLDER'.")
    ] = "",
    real: Annotated[Path | None, typer.Option(help="Folder of real pictures for fid.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples an arm.", show_default="2000 digits, or one a prompt")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures of a pipeline at once.", show_default="4")] = None,
    steps: StepsOption = 25,
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Interleaved timing rounds; 0 for none.", show_default="30, or 5 of a pipeline")
    ] = None,
    optimize: Annotated[bool, typer.Option("--optimize", help="Sample with the engine.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make a pipeline's pictures anew, those that OUTPUT holds too.")] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Measure an adapter against two-pass CFG and no guidance, from the same noise: pictures, numbers, a report."""
    asked = {"prompts": prompts, "inputs": inputs, "labels": labels, "call": call, "scales": scales, "real": real}
    asked["metrics"] = metrics or None
    if model == "digits" and _given(asked):
        names = ", ".join(f"--{name}" for name in _given(asked))
        raise typer.BadParameter(f"{names} go(es) with a pipeline; expected --model as well")
    if model == "digits" and samples is not None and samples < 4:
        raise typer.BadParameter(f"--samples: precision and recall of digits expect at least 4, found {samples}")
    if inputs is not None and labels is not None:
        raise typer.BadParameter("expected --inputs or --labels, found both")
    directory = output or Path(adapter if model == "digits" else "runs/evaluate")
    common: dict[str, Any] = {"steps": steps, "seed": seed, "progress": not quiet}
    common |= _given({"samples": samples, "timing_rounds": rounds})
    rows = None if inputs is None else read_inputs(inputs)
    of_pipeline = {
        "prompts": prompts,
        "inputs": rows if labels is None else {"class_labels": parse_labels(labels)},
        "call": None if call is None else parse_call(call),
        "guidance_scales": None if scales is None else parse_scales(scales),
        "metrics": parse_metrics(metrics),
        "real": real,
        "batch_size": batch_size,
        "resume": not fresh,
    }
    loaded = agd.load(load_model(model, dtype), adapter)
    if optimize:
        agd.optimize(loaded)
    if model == "digits":
        _evaluate_digits(loaded, directory, **common)
    else:
        _evaluate_pipeline(loaded, output_dir=directory, **of_pipeline, **common)
    console.print(f"\npictures and tables: {directory / 'report.html'}", markup=False)


def _evaluate_digits(teacher: Any, directory: Path, **settings: Any) -> None:
    from agd_fast.demo import report_digits
    from agd_fast.reporting.tables import print_evaluation

    done = report_digits(teacher, directory, **settings)
    print_evaluation(done.result, done.bars, console)


def _evaluate_pipeline(pipe: Any, **settings: Any) -> None:
    from agd_fast.reporting.pipeline_tables import print_pipeline_evaluation

    print_pipeline_evaluation(agd.evaluate_pipeline(pipe, **settings), console)


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="Adapters as the paper's reference code writes them, e.g. 0005000.pt.")],
    config: Annotated[Path, typer.Option(help="The YAML that they were trained with.")],
    model: Annotated[str, typer.Option(help="Their base: a folder or Hub id of a diffusers pipeline.")],
    output: OutputOption = Path("runs/converted"),
) -> None:
    """Import adapters trained with the paper's reference code."""
    written = agd.convert(checkpoint, config=config, base=denoiser_of(load_model(model)), output_dir=output)
    console.print(f"written to {written}", markup=False)


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(help="Folder with an adapter.")],
    repo: Annotated[str, typer.Argument(help="Repo of the Hub, 'name/repo'.")],
    private: Annotated[bool, typer.Option("--private", help="Where the repo is new, only you may see it.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    license: Annotated[str | None, typer.Option(help="Licence of the adapter, for its model card.")] = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, with a model card."""
    url = agd.push_to_hub(adapter, repo, private=private, revision=revision, commit_message=message, license=license)
    console.print(url, markup=False)


@app.command()
def info(
    adapter: Annotated[str | None, typer.Argument(help="Folder or Hub repo of an adapter to describe.")] = None,
) -> None:
    """Versions, devices, what is installed, what the Triton kernels do; with ADAPTER, what it is and what it was made for."""
    from agd_fast.reporting.tables import rich_table

    tables = [
        rich_table("environment", ("", "found"), list(agd.info()["environment"].items()), "left"),
        rich_table("kernels", ("", "found"), describe_kernels(), "left"),
    ]
    if adapter is not None:
        tables.append(rich_table(escape(adapter), ("", "found"), describe(resolve(adapter)), "left"))
    for table in tables:
        console.print(table)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def describe_kernels() -> list[tuple[str, str]]:
    """Whether the Triton kernels run here, and what was measured of them, in rows for a reader."""
    found = kernels_info()
    rows = [
        ("policy", found["policy"]),
        ("can run", f"no: {found['missing']}" if found["missing"] else "yes"),
        ("ops", ", ".join(found["ops"])),
        *((f"{name} is left to torch", reason) for name, reason in found["failed"].items()),
    ]
    if "kept" in found:
        rows.append(("measured", f"{found['measured']} shapes on this card, kept in {found['kept']}"))
    return [(name, escape(text)) for name, text in rows]


def describe(adapter: Path) -> list[tuple[str, str]]:
    """What an adapter's config says, in rows for a reader."""
    from agd_fast.storage import read_config

    config = read_config(adapter)
    sites = [site["path"] for found in config["layout"]["sites"].values() for site in found]
    entries: dict[str, Any] = {
        "base": config["base_class"],
        **config["adapter"],
        "sites": len(sites),
        "first site": sites[0],
        **{name: value for name, value in config["about"].items() if not isinstance(value, dict) and value is not None},
        "library": config["library_version"],
        "format": config["format_version"],
    }
    return [(name, str(value)) for name, value in entries.items()]


def parse_labels(text: str) -> list[int]:
    """'0-9', '3' or '1,5,7-9' as a list."""
    labels: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            labels.extend(range(int(first), int(last or first) + 1))
    except ValueError:
        labels = []
    if not labels:
        raise typer.BadParameter(f"expected labels such as '0-9' or '1,5,7', found {text!r}")
    return labels


def parse_scales(text: str) -> list[float]:
    """'5' or '5,7.5' as a list."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"expected guidance scales such as '5,7.5', found {text!r}") from error


def parse_metrics(text: str) -> dict[str, str]:
    """'lpips,clip=FOLDER' as which network by metric, the default one where none is named."""
    from agd_fast.evaluation.networks import DEFAULTS

    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return {name: which or DEFAULTS.get(name, "") for name, _, which in parts}


def parse_call(text: str) -> dict[str, Any]:
    """Arguments of a pipeline's call from JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"expected JSON such as '{{\"height\": 768}}', found {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, found {text!r}")
    return value


def load_model(name: str, dtype: str = "float32", *, place: bool = True) -> Any:
    """A model on the GPU, if there is one. place: False leaves that to who saves memory."""
    device = "cuda" if place and torch.cuda.is_available() else "cpu"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16 or float16, found {dtype!r}")
    if name == "digits":
        teacher = agd.datasets.digits_teacher()
        teacher.denoiser.to(device)
        return teacher
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(name, torch_dtype=getattr(torch, dtype)).to(device)


def to_images(pipeline: Any, samples: torch.Tensor) -> torch.Tensor:
    """Samples in [−1, 1], through the pipeline's VAE where it has one."""
    vae = getattr(pipeline, "vae", None)
    if vae is None:
        return samples
    with torch.inference_mode():
        return vae.decode(samples / vae.config.scaling_factor).sample


def main() -> None:
    """Expected errors and warnings as one line, without a traceback."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    warnings.showwarning = lambda message, *_, **__: stderr.print(f"[yellow]warning:[/yellow] {escape(str(message))}")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError) as error:
        hint = "; expected pip install 'agd-fast[demo]'" if isinstance(error, ModuleNotFoundError) else ""
        stderr.print(f"[red]error:[/red] {escape(str(error))}{escape(hint)}")
        raise SystemExit(1) from error
