"""Pipelines that take one prompt a call, where they guide: PRX with 2 blocks, and Wan VACE with 2 beside 2 that control them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PRXPipeline,
    PRXTransformer2DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.pipelines.prx import pipeline_prx
from diffusers.pipelines.wan import pipeline_wan_vace

from tiny import wan
from tiny._language import t5_gemma
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.images import beside
from tiny.sd15 import image, mask
from tiny.text import byte_tokenizer, prompts

for module in (pipeline_prx, pipeline_wan_vace):
    vars(module).setdefault("ftfy", SimpleNamespace(fix_text=str))  # which these want


def prx() -> PRXPipeline:
    torch.manual_seed(0)
    model = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    model = lively(model, gains={"*.txt_kv_proj.weight": 4.0})
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)  # which its decoding wants
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(PRXPipeline(model, scheduler, t5_gemma(24).encoder, byte_tokenizer(), vae))


def wan_vace() -> WanVACEPipeline:
    torch.manual_seed(0)
    channels = 2 * 4 + 8 * 8  # what is kept and what is painted over, and the pixels of the mask
    model = WanVACETransformer3DModel(**wan.SIZES, vace_layers=[0, 1], vace_in_channels=channels)
    return beside(WanVACEPipeline, wan.pipeline(), transformer=lively(model))


def videos(count: int) -> dict[str, Any]:
    """To paint the right half of, beside a picture of what."""
    size = (32, 32)
    frames = [[image(10 * row + frame).resize(size) for frame in range(5)] for row in range(count)]
    shown = [[image(row).resize(size)] for row in range(count)]
    return {"prompt": prompts(count), "video": frames, "mask": [[mask().resize(size)] * 5] * count, "reference_images": shown}


SIBLINGS = {
    family.name: family
    for family in (
        TinyFamily(
            "prx",
            prx,
            lambda count: {"prompt": prompts(count)},
            {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "use_resolution_binning": False},
        ),
        TinyFamily("wan_vace", wan_vace, videos, wan.CALL),
    )
}
