"""Triton kernels of agd_fast's operations: `<op>_fwd`, each in the module named like its op, imported on first use.

The shapes and their check are in `shapes` and need no Triton.
"""

from __future__ import annotations

import importlib
from typing import Any

LAUNCHERS = (
    "activated_linear_fwd",
    "ada_group_norm_fwd",
    "ada_layer_norm_fwd",
    "gated_lora_fwd",
    "gated_residual_fwd",
    "guidance_combine_fwd",
    "guided_update_fwd",
    "norm_scores_fwd",
    "projection_mix_fwd",
    "projection_scores_fwd",
    "residual_norm_fwd",
)


def __getattr__(name: str) -> Any:
    if name not in LAUNCHERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{name.removesuffix('_fwd')}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *LAUNCHERS]
