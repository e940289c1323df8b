"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option(help="'digits' (ships with the package), or the folder or Hub id of a diffusers pipeline.")
]
LabelsOption = Annotated[
    str | None,
    typer.Option(help="Class labels: '0-9', '3', '1,5,7' or a mix.", show_default="all those of a class-conditional model"),
]
InputsOption = Annotated[
    Path | None,
    typer.Option(
        help='Instead of prompts: file with one JSON object per line, e.g. {"prompt": "a red cat", "image": "cat.png"}.'
    ),
]
AdapterArgument = Annotated[str, typer.Argument(help="Folder of an adapter, or the id of a Hub repo.")]
DtypeOption = Annotated[str, typer.Option(help="Precision of the base: float32, bfloat16 or float16.")]
OutputOption = Annotated[Path, typer.Option(help="Folder to write to.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Number of sampling steps.")]
SeedOption = Annotated[int, typer.Option(help="Seed for all random numbers.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show no progress bars.")]
