"""agd-fast convert: imports adapters of the paper's reference code."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import OutputOption
from agd_fast.cli.reading import load_model


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Checkpoint that the paper's reference code wrote, e.g. 0005000.pt."),
    ],
    config: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The YAML file that the adapters were trained with.")],
    model: Annotated[str, typer.Option(help="Base of the adapters: the folder or Hub id of a diffusers pipeline.")],
    output: OutputOption = Path("runs/converted"),
) -> None:
    """Import adapters trained with the paper's reference code."""
    from agd_fast.attaching import denoiser_of

    written = agd.convert(checkpoint, config=config, base=denoiser_of(load_model(model)), output_dir=output)
    console.print(f"written to {written}", markup=False)
