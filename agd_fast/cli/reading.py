"""What the texts of options stand for."""

from __future__ import annotations

import json
from typing import Any

import torch
import typer

import agd_fast as agd


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were."""
    return {name: value for name, value in options.items() if value is not None}


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
    """'lpips,clip=FOLDER' as which network by metric, the default one where none is named."""
    from agd_fast.evaluation.networks import DEFAULTS

    parts = [part.strip().partition("=") for part in text.split(",") if part.strip()]
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


def load_model(name: str, dtype: str = "float32", *, place: bool = True) -> Any:
    """A model on the GPU, if there is one. place: False leaves that to who saves memory."""
    device = "cuda" if place and torch.cuda.is_available() else "cpu"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"expected float32, bfloat16 or float16, found {dtype!r}")
    if name == "digits":
        teacher = agd.datasets.digits_teacher()
        teacher.denoiser.to(device)
        return teacher
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(name, torch_dtype=getattr(torch, dtype)).to(device)
