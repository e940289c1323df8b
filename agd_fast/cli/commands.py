"""The commands under one name, and what an error looks like."""

from __future__ import annotations

import warnings

import torch
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

app = typer.Typer(
    help="One forward a step where classifier-free guidance needs two: Adapter Guidance Distillation for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo, distill, estimate, sample, evaluate, convert, push, info):
    app.command()(command)


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
