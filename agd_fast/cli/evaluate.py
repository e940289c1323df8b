"""agd-fast evaluate: an adapter against two-pass CFG and no guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import AdapterArgument, DtypeOption, InputsOption, ModelOption, QuietOption, SeedOption, StepsOption
from agd_fast.cli.reading import given, load_model, parse_call, parse_labels, parse_metrics, parse_scales
from agd_fast.datasets import read_inputs


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
    if model == "digits" and given(asked):
        names = ", ".join(f"--{name}" for name in given(asked))
        raise typer.BadParameter(f"{names} go(es) with a pipeline; expected --model as well")
    if model == "digits" and samples is not None and samples < 4:
        raise typer.BadParameter(f"--samples: precision and recall of digits expect at least 4, found {samples}")
    if inputs is not None and labels is not None:
        raise typer.BadParameter("expected --inputs or --labels, found both")
    directory = output or Path(adapter if model == "digits" else "runs/evaluate")
    common: dict[str, Any] = {"steps": steps, "seed": seed, "progress": not quiet}
    common |= given({"samples": samples, "timing_rounds": rounds})
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
