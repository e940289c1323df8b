"""The known diffusers backbones: one spec per denoiser class, found through the MRO of a denoiser's class."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from agd_fast.families import (
    allegro,
    animatediff,
    audioldm,
    audioldm2,
    auraflow,
    bria,
    bria_fibo,
    bria_fibo2,
    chroma,
    chronoedit,
    cogvideox,
    cogview3,
    cogview4,
    cosmos,
    deepfloyd_if,
    dit,
    easyanimate,
    ernie_image,
    flux,
    flux2,
    hidream,
    hunyuan_image,
    hunyuandit,
    hunyuanvideo,
    hunyuanvideo15,
    joyimage,
    kandinsky2,
    kandinsky3,
    kandinsky5,
    krea2,
    latte,
    longcat_audio,
    longcat_image,
    ltx,
    lumina,
    lumina2,
    mochi,
    motif_video,
    nucleusmoe_image,
    ovis_image,
    pixart,
    prior,
    prx,
    qwenimage,
    sana,
    sana_video,
    sd3,
    skyreels,
    stable_audio,
    stable_audio3,
    stable_cascade,
    unet,
    unet3d,
    wan,
    wan_vace,
    zimage,
)
from agd_fast.families.discovery import EXAMPLE, discover
from agd_fast.sites import config_value
from agd_fast.spec import DenoiserSpec

__all__ = ["SPECS", "VARIANTS", "discover", "find_spec"]

# by the name under which diffusers exports the class: no class is imported here, and the installed diffusers may lack it
SPECS: dict[str, DenoiserSpec] = {
    **allegro.SPECS,
    **animatediff.SPECS,
    **audioldm2.SPECS,
    **auraflow.SPECS,
    **bria.SPECS,
    **bria_fibo.SPECS,
    **bria_fibo2.SPECS,
    **chroma.SPECS,
    **chronoedit.SPECS,
    **cogvideox.SPECS,
    **cogview3.SPECS,
    **cogview4.SPECS,
    **cosmos.SPECS,
    **dit.SPECS,
    **easyanimate.SPECS,
    **ernie_image.SPECS,
    **flux.SPECS,
    **flux2.SPECS,
    **hidream.SPECS,
    **hunyuan_image.SPECS,
    **hunyuandit.SPECS,
    **hunyuanvideo.SPECS,
    **hunyuanvideo15.SPECS,
    **joyimage.SPECS,
    **kandinsky3.SPECS,
    **kandinsky5.SPECS,
    **krea2.SPECS,
    **latte.SPECS,
    **longcat_audio.SPECS,
    **longcat_image.SPECS,
    **ltx.SPECS,
    **lumina.SPECS,
    **lumina2.SPECS,
    **mochi.SPECS,
    **motif_video.SPECS,
    **nucleusmoe_image.SPECS,
    **ovis_image.SPECS,
    **pixart.SPECS,
    **prior.SPECS,
    **prx.SPECS,
    **qwenimage.SPECS,
    **sana.SPECS,
    **sana_video.SPECS,
    **sd3.SPECS,
    **skyreels.SPECS,
    **stable_audio.SPECS,
    **stable_audio3.SPECS,
    **stable_cascade.SPECS,
    **unet.SPECS,
    **unet3d.SPECS,
    **wan.SPECS,
    **wan_vace.SPECS,
    **zimage.SPECS,
}

# by class, specs of models that are conditioned or built differently, by the config entry (name=value) that marks them
VARIANTS: dict[str, dict[str, DenoiserSpec]] = {
    name: {**audioldm.VARIANTS[name], **deepfloyd_if.VARIANTS[name], **kandinsky2.VARIANTS[name]} for name in unet.SPECS
}


def find_spec(denoiser: nn.Module) -> DenoiserSpec:
    """The spec of a denoiser's class or of its nearest known base class, or the variant that the denoiser's config asks for.

    Raises: TypeError when there is none.
    """
    for cls in type(denoiser).__mro__:
        if cls.__name__ in SPECS and getattr(diffusers, cls.__name__, None) is cls:
            variants = VARIANTS.get(cls.__name__, {}).items()
            return next((spec for entry, spec in variants if _has(denoiser, entry)), SPECS[cls.__name__])
    raise TypeError(
        f"no DenoiserSpec is known for {type(denoiser).__name__}; known: {', '.join(SPECS)}. Describe it, as in "
        f"agd_fast.Teacher(denoiser, scheduler, spec={EXAMPLE}), or let spec=agd_fast.discover(denoiser) propose one"
    )


def _has(denoiser: nn.Module, entry: str) -> bool:
    """entry: "name=value", or "name=config.<attribute>"."""
    name, _, value = entry.partition("=")
    found, expected = getattr(getattr(denoiser, "config", None), name, None), config_value(denoiser, value)
    return _plain(found) == _plain(expected)


def _plain(value: Any) -> Any:
    return [*value] if isinstance(value, tuple) else value  # as in a config read from a file
