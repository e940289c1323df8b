"""agd-fast demo: the whole method on the digits that ship with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agd_fast.cli.console import console
from agd_fast.cli.options import OutputOption, QuietOption, SeedOption


def demo(
    output: OutputOption = Path("runs/demo"),
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=20, help="Samples per arm (unguided, CFG, AGD) for the measured distances.")] = 2000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew instead of resuming the run in OUTPUT.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Distil the digits teacher that ships with the package, compare one pass with two, and write a report with pictures."""
    from agd_fast.demo import run_demo
    from agd_fast.reporting.tables import print_evaluation

    done = run_demo(output, seed=seed, samples=samples, resume=not fresh, progress=not quiet)
    print_evaluation(done.result, done.bars, console)
    console.print(
        f"\n{done.report['seconds']['total']:.0f} s in all; pictures and tables: {output / 'report.html'}", markup=False
    )
