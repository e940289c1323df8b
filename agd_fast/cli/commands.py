"""All commands as one program, and how errors are shown."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from agd_fast.cli.convert import convert
from agd_fast.cli.demo import demo
from agd_fast.cli.distill import distill
from agd_fast.cli.estimate import estimate
from agd_fast.cli.evaluate import evaluate
from agd_fast.cli.info import info
from agd_fast.cli.push import push
from agd_fast.cli.sample import sample
from agd_fast.version import __version__

EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError)

app = typer.Typer(
    help="One forward pass per step where classifier-free guidance needs two: "
    "Adapter Guidance Distillation for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, distill, estimate, sample, evaluate, convert, push, info):
    app.command()(command)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"agd-fast {__version__}")
        raise typer.Exit


@app.callback()
def of_all(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options that go before a command."""


def main() -> None:
    """Runs the program; shows expected errors and warnings as one line, without a traceback."""
    stderr = Console(stderr=True, highlight=False, soft_wrap=True)
    warnings.showwarning = lambda message, *_, **__: stderr.print(f"[yellow]warning:[/yellow] {escape(str(message))}")
    try:
        app()
    except Exception as error:
        import torch

        if not isinstance(error, (*EXPECTED, torch.OutOfMemoryError)):
            raise
        hint = "; expected pip install 'agd-fast[demo]'" if isinstance(error, ModuleNotFoundError) else ""
        stderr.print(f"[red]error:[/red] {escape(str(error))}{escape(hint)}")
        raise SystemExit(1) from error
