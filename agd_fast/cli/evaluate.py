"""agd-fast evaluate: compares an adapter with two-pass CFG and with no guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import AdapterArgument, DtypeOption, InputsOption, ModelOption, QuietOption, SeedOption, StepsOption
from agd_fast.cli.reading import (
    find_adapter,
    given,
    load_model,
    parse_call,
    parse_labels,
    parse_metrics,
    parse_scales,
    require_one,
    require_pipeline,
)


def evaluate(
    adapter: AdapterArgument,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to.", show_default="ADAPTER itself for digits, else runs/evaluate")
    ] = None,
    model: ModelOption = "digits",
    prompts: Annotated[
        Path | None,
        typer.Option(help="For a text pipeline: file with one prompt per line, none of which the adapter was distilled on."),
    ] = None,
    inputs: InputsOption = None,
    labels: Annotated[str | None, typer.Option(help="For a class-conditional pipeline: class labels, e.g. '0-9'.")] = None,
    call: Annotated[
        str | None,
        typer.Option(help="Further arguments of the pipeline's call, as JSON: those that the adapter was distilled with."),
    ] = None,
    dtype: DtypeOption = "float32",
    scales: Annotated[
        str | None,
        typer.Option(help="Guidance scales, e.g. '5,7.5'.", show_default="for a pipeline, the middle of the trained range"),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help="More metrics of a pipeline's pictures: lpips, clip, fid; or with other networks, e.g. 'lpips=vgg,clip=FOLDER'."
        ),
    ] = "",
    real: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Folder of real pictures, for fid.")] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples per arm.", show_default="2000 digits, or one per prompt")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures that a pipeline makes at once.", show_default="4")
    ] = None,
    steps: StepsOption = 25,
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Interleaved timing rounds; 0 for none.", show_default="30, or 5 for a pipeline")
    ] = None,
    optimize: Annotated[bool, typer.Option("--optimize", help="Sample with the engine.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Make all of a pipeline's pictures anew, including those in OUTPUT.")
    ] = False,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
) -> None:
    """Compare an adapter with two-pass CFG and with no guidance, from the same noise: pictures, numbers and a report."""
    rows: dict[str, Any] = {"prompts": prompts, "inputs": inputs, "labels": labels}
    require_pipeline(model, **rows, call=call, scales=scales, real=real, metrics=metrics or None)
    require_one(**rows)
    if model == "digits" and samples is not None and samples < 4:
        raise typer.BadParameter(f"--samples: precision and recall of digits expect at least 4, found {samples}")
    directory = output or Path(adapter if model == "digits" else "runs/evaluate")
    common: dict[str, Any] = {"steps": steps, "seed": seed, "progress": not quiet}
    common |= given({"samples": samples, "timing_rounds": rounds})
    of_pipeline = {
        "prompts": None if prompts is None else agd.datasets.read_prompts(prompts),
        "inputs": None if inputs is None else agd.datasets.read_inputs(inputs),
        "call": None if call is None else parse_call(call),
        "guidance_scales": None if scales is None else parse_scales(scales),
        "metrics": parse_metrics(metrics),
        "real": real,
        "batch_size": batch_size,
        "resume": not fresh,
    }
    if labels is not None:
        of_pipeline["inputs"] = {"class_labels": parse_labels(labels)}
    if model != "digits" and not given(rows):
        raise typer.BadParameter("expected --prompts, --inputs or --labels that the adapter was not distilled on, found none")
    folder = find_adapter(adapter)
    loaded = agd.load(load_model(model, dtype), folder)
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
