"""agd-fast estimate: how much memory distilling a model takes."""

from __future__ import annotations

from typing import Annotated

import typer

import agd_fast as agd
from agd_fast.cli.console import console
from agd_fast.cli.options import DtypeOption
from agd_fast.cli.reading import load_model


def estimate(
    model: Annotated[str, typer.Argument(help="'digits', or the folder or Hub id of a diffusers pipeline.")],
    resolution: Annotated[
        int | None, typer.Option(min=1, help="Edge length of the pictures in pixels.", show_default="the model's own")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="States in a forward pass.")] = 1,
    kind: Annotated[str | None, typer.Option(help="Kind of adapter.", show_default="depends on the backbone")] = None,
    base_weights: Annotated[str | None, typer.Option(help="int8 or nf4, as in distill.")] = None,
    dtype: DtypeOption = "bfloat16",
) -> None:
    """Estimate how much memory distilling a model takes, by what is kept for the backward pass. Needs no GPU."""
    from agd_fast.memory.choose import ways_of

    ways_of(None, base_weights, None)  # type: ignore[arg-type]
    adapter = None if kind is None else agd.AdapterConfig(kind)
    found = agd.estimate_memory(
        load_model(model, dtype, place=False),
        resolution=resolution,
        batch_size=batch_size,
        adapter=adapter,
        base_weights=base_weights,  # type: ignore[arg-type]
    )
    console.print(str(found), markup=False, highlight=False)
