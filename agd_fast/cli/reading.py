"""What the texts of options stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

import agd_fast as agd

DTYPES = ("float32", "bfloat16", "float16")


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were."""
    return {name: value for name, value in options.items() if value is not None}


def require_one(**options: Any) -> None:
    """Raises: typer.BadParameter for options that stand for the same and are given together."""
    names, found = ([f"--{name}" for name in some] for some in (options, given(options)))
    if len(found) > 1:
        raise typer.BadParameter(f"expected one of {', '.join(names)}; found {' and '.join(found)}")


def require_pipeline(model: str, **options: Any) -> None:
    """Raises: typer.BadParameter for options that the digits do not have."""
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
    """'lpips,clip=FOLDER' as which network by metric, the default one where none is named. Raises: ValueError for another."""
    from agd_fast.evaluation.networks import DEFAULTS, require_known

    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    require_known(name for name, _, _ in parts)
    return {name: which or DEFAULTS.get(name, "") for name, _, which in parts}


def parse_call(text: str) -> dict[str, Any]:
    """Arguments of a pipeline's call from JSON."""
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
    """A model on the GPU, if there is one. place: False leaves that to who saves memory.

    It may take minutes: what does not need the model is checked before.
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
