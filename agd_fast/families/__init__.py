"""The backbones of diffusers that are known: one entry a denoiser class, found through its MRO."""

from __future__ import annotations

import diffusers
from torch import nn

from agd_fast.families import (
    auraflow,
    chroma,
    cogvideox,
    cogview4,
    dit,
    hidream,
    hunyuanvideo15,
    kandinsky5,
    ltx,
    lumina2,
    pixart,
    qwenimage,
    sana,
    sd3,
    stable_audio,
    unet,
    wan,
    zimage,
)
from agd_fast.families.discovery import EXAMPLE, discover
from agd_fast.spec import DenoiserSpec

__all__ = ["SPECS", "discover", "find_spec"]

# by the name under which diffusers exports the class: it is imported only where it is met, and may be newer than diffusers is
SPECS: dict[str, DenoiserSpec] = {
    **auraflow.SPECS,
    **chroma.SPECS,
    **cogvideox.SPECS,
    **cogview4.SPECS,
    **dit.SPECS,
    **hidream.SPECS,
    **hunyuanvideo15.SPECS,
    **kandinsky5.SPECS,
    **ltx.SPECS,
    **lumina2.SPECS,
    **pixart.SPECS,
    **qwenimage.SPECS,
    **sana.SPECS,
    **sd3.SPECS,
    **stable_audio.SPECS,
    **unet.SPECS,
    **wan.SPECS,
    **zimage.SPECS,
}


def find_spec(denoiser: nn.Module) -> DenoiserSpec:
    """The spec of a denoiser's class or of its nearest known base class.

    Raises: TypeError when there is none.
    """
    for cls in type(denoiser).__mro__:
        if cls.__name__ in SPECS and getattr(diffusers, cls.__name__, None) is cls:
            return SPECS[cls.__name__]
    raise TypeError(
        f"no DenoiserSpec is known for {type(denoiser).__name__}; known: {', '.join(SPECS)}. Describe it, as in "
        f"agd_fast.Teacher(denoiser, scheduler, spec={EXAMPLE}), or let spec=agd_fast.discover(denoiser) propose one"
    )
