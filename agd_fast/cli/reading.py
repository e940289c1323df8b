"""Parsers and checks of the values of options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

import agd_fast as agd

DTYPES = ("float32", "bfloat16", "float16")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def require_one(**options: Any) -> None:
    """Raises: typer.BadParameter when more than one of these mutually exclusive options is given."""
    names, found = ([f"--{name}" for name in some] for some in (options, given(options)))
    if len(found) > 1:
        raise typer.BadParameter(f"expected one of {', '.join(names)}; found {' and '.join(found)}")


def require_pipeline(model: str, **options: Any) -> None:
    """Raises: typer.BadParameter when one of these options is given with the digits, which do not have it."""
    if model == "digits" and given(options):
        names = ", ".join(f"--{name}" for name in given(options))
        raise typer.BadParameter(f"{names} go(es) with a pipeline; expected --model as well")


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
    """'lpips,clip=FOLDER' as {metric: network}, by default the metric's own network. Raises: ValueError for unknown ones."""
    from agd_fast.evaluation.networks import DEFAULTS, require_known

    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    require_known(name for name, _, _ in parts)
    return {name: which or DEFAULTS.get(name, "") for name, _, which in parts}


def parse_call(text: str) -> dict[str, Any]:
    """Arguments of a pipeline's call, parsed from JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"expected JSON such as '{{\"height\": 768}}', found {text!r}: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"expected a JSON object, found {text!r}")
    return value


def find_adapter(source: str) -> Path:
    """The folder of an adapter. Raises: FileNotFoundError, ValueError when there is none that can be read."""
    from agd_fast.sources import resolve
    from agd_fast.storage import read_config

    folder = resolve(source)
    read_config(folder)
    return folder


def load_model(name: str, dtype: str = "float32", *, place: bool = True) -> Any:
    """A model, on the GPU if there is one. place: False keeps it on the CPU, for callers that move it themselves to save memory.

    Loading may take minutes: check first what can be checked without the model.
    """
    import torch

    device = "cuda" if place and torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, found {dtype!r}")
    if name == "digits":
        teacher = agd.datasets.digits_teacher()
        teacher.denoiser.to(device)
        return teacher
    from accelerate.utils import compare_versions
    from diffusers import DiffusionPipeline

    argument = "dtype" if compare_versions("diffusers", ">=", "0.40") else "torch_dtype"
    return DiffusionPipeline.from_pretrained(name, **{argument: getattr(torch, dtype)}).to(device)
