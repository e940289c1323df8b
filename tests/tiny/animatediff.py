"""AnimateDiff on U-Nets of one level, as of Stable Diffusion 1.5 and XL."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AnimateDiffSDXLPipeline,
    EulerDiscreteScheduler,
    MotionAdapter,
    UNetMotionModel,
)

from tiny import sd15, sdxl
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer

LEVEL: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "block_out_channels": (8,),
}


def motion_unet(**overrides: Any) -> UNetMotionModel:
    """With motion modules at both sides and none in the middle."""
    unet = sd15.unet(**{**LEVEL, **overrides})
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=2,
        motion_max_seq_length=4,
        use_motion_mid_block=False,
    )
    return lively(
        UNetMotionModel.from_unet2d(unet, adapter), gains={"conv_out.weight": 0.25, "*.attentions.*.attn2.to_v.weight": 3.0}
    )


def pipeline() -> AnimateDiffPipeline:
    vae, scheduler = tiny_vae(), sd15.scheduler()
    return quiet(AnimateDiffPipeline(vae, clip_text(16), clip_tokenizer(), motion_unet(), None, scheduler))


def pipeline_xl() -> AnimateDiffSDXLPipeline:
    unet = motion_unet(
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    return quiet(
        AnimateDiffSDXLPipeline(
            vae=tiny_vae(),
            text_encoder=clip_text(8),
            text_encoder_2=clip_text(16, projection=8, seed=1),
            tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(),
            unet=unet,
            motion_adapter=None,
            scheduler=EulerDiscreteScheduler(**sdxl.BETAS, steps_offset=1, timestep_spacing="leading"),
        )
    )


CALL = {**sd15.CALL, "height": 8, "width": 8, "num_frames": 2}

FAMILY = TinyFamily("animatediff", pipeline, sd15.inputs, CALL)

SIBLINGS = {"animatediff_xl": TinyFamily("animatediff_xl", pipeline_xl, sd15.inputs, CALL)}
