"""Pictures in little memory: a VAE decodes them in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from agd_fast.attaching import uncompiled

TILE = 512  # largest edge of a tile, in pixels
_SET = ("use_", "tile_")  # prefixes of the names of a VAE's settings
DECODERS = ("vae", "movq", "vqgan")  # parts of a pipeline that make pictures from latents


def decoder_of(pipe: Any) -> Any:
    """The pipeline's decoder, or None."""
    return next((part for name in DECODERS if (part := getattr(pipe, name, None)) is not None), None)


@contextmanager
def tiled(vae: Any) -> Iterator[None]:
    """Inside, a VAE of diffusers decodes in tiles, if it can; afterwards its settings are as they were."""
    vae = uncompiled(vae)
    if not hasattr(vae, "use_tiling"):  # without tiling, enable_tiling is there but raises
        yield
        return
    before = {name: value for name, value in vars(vae).items() if name.startswith(_SET)}
    try:
        vae.enable_tiling()
        size = before.get("tile_sample_min_size")
        if isinstance(size, int) and size > TILE:  # SDXL's tiles are as large as its pictures
            vae.tile_sample_min_size, vae.tile_latent_min_size = TILE, vae.tile_latent_min_size * TILE // size
        yield
    finally:
        for name in [name for name in vars(vae) if name.startswith(_SET)]:
            delattr(vae, name)
        vars(vae).update(before)
