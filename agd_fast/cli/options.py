"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
