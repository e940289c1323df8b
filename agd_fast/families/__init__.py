"""The backbones of diffusers that are known: one entry a denoiser class, found through its MRO."""

from __future__ import annotations

from torch import nn

from agd_fast.families import dit, unet
from agd_fast.spec import DenoiserSpec

SPECS: dict[type, DenoiserSpec] = {**dit.SPECS, **unet.SPECS}


def find_spec(denoiser: nn.Module) -> DenoiserSpec:
    """The spec of a denoiser's class or of its nearest known base class.

    Raises: TypeError when there is none.
    """
    for cls in type(denoiser).__mro__:
        if cls in SPECS:
            return SPECS[cls]
    raise TypeError(
        f"no DenoiserSpec is known for {type(denoiser).__name__}; known: "
        f"{', '.join(cls.__name__ for cls in SPECS)}. Describe it with "
        "agd_fast.Teacher(denoiser, scheduler, spec=agd_fast.DenoiserSpec(...))"
    )
