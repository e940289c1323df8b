"""StableDiffusionXLPipeline: two text encoders, pooled embeddings and sizes beside them, a scheduler that scales its input."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from tiny._parts import quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.sd15 import CALL, inputs, unet
from tiny.text import clip_text, clip_tokenizer

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet_xl(**overrides: Any) -> UNet2DConditionModel:
    return unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
        **overrides,
    )


def pipeline() -> StableDiffusionXLPipeline:
    return quiet(
        StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=clip_text(8),
            text_encoder_2=clip_text(16, projection=8, seed=1),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet_xl(),
            scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
            add_watermarker=False,
        )
    )


def projected() -> StableDiffusionXLPipeline:
    """With the U-Net of Kolors, which projects embeddings of 12 channels to the 24 of cross-attention; no text encoder."""
    unet = unet_xl(encoder_hid_dim_type="text_proj", encoder_hid_dim=12)
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    return quiet(StableDiffusionXLPipeline(vae=tiny_vae(), unet=unet, scheduler=scheduler, add_watermarker=False, **encoders))


def embeddings(count: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = {"prompt_embeds": (16, 12), "pooled_prompt_embeds": (8,)}
    rows = {name: torch.randn(count, *shape, generator=random) for name, shape in shapes.items()}
    empty = {f"negative_{name}": torch.zeros(count, *shape) for name, shape in shapes.items()}
    return {**rows, **empty}


FAMILY = TinyFamily("sdxl", pipeline, inputs, CALL)

SIBLINGS = {"kolors": TinyFamily("kolors", projected, embeddings, CALL)}
