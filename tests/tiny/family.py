"""What a test must know of a family to run it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
from packaging.version import Version

WITH_ALL = Version("0.42.1")  # of diffusers


@dataclass(frozen=True)
class TinyFamily:
    """A pipeline with random weights, and how it is called.

    pipeline: builds it: seeded, float32, on the CPU, offline, in at most a few seconds; modules in eval mode.
    inputs: n different rows of what is conditioned on, by the argument of the pipeline's call: {"prompt": [str] * n} where a
        tokenizer and text encoder can be built offline, {"class_labels": [int] * n}, or {"prompt_embeds": [n, L, D], …}.
    call: the other arguments of a call: height, width, num_inference_steps, output_type="latent", ….
    guided: arguments that switch the pipeline's own guidance on, by scale: {"guidance_scale": 4.0}.
    off: arguments that switch it off.
    omega_offset: ω of `guided` is its scale plus this.
    sign: −1 where the pipeline turns the sign of the denoiser's prediction before the scheduler gets it.
    """

    name: str
    pipeline: Callable[[], Any]
    inputs: Callable[[int], dict[str, Any]]
    call: dict[str, Any]
    guided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 4.0})
    off: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    omega_offset: float = 0.0
    sign: int = 1


def _found() -> dict[str, TinyFamily]:
    """Every FAMILY or FAMILIES of the files beside this one, but of what an older diffusers lacks."""
    found: dict[str, TinyFamily] = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        if path.stem not in ("family", "images", "single", "text"):
            try:
                module = import_module(f"tiny.{path.stem}")
            except ImportError as missing:
                if not (missing.name or "").startswith("diffusers") or Version(diffusers.__version__) >= WITH_ALL:
                    raise
                continue
            for family in getattr(module, "FAMILIES", None) or [module.FAMILY]:
                found[family.name] = family
    return found


FAMILIES = _found()
