"""StableDiffusion3Pipeline, three text encoders; `sd35` has query and key norms and dual attention in its first layer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.sd15 import CALL, inputs
from tiny.text import clip_text, clip_tokenizer, t5_encoder, t5_tokenizer


def pipeline(**overrides: Any) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=8 + 8,
        pos_embed_max_size=8,
        **overrides,
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0609)
    return quiet(
        StableDiffusion3Pipeline(
            transformer=lively(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae,
            text_encoder=clip_text(8, projection=8),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip_text(16, projection=8, seed=1),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(24),
            tokenizer_3=t5_tokenizer(),
        )
    )


CALL_3 = {**CALL, "max_sequence_length": 16}

FAMILIES = [
    TinyFamily("sd3", pipeline, inputs, CALL_3),
    TinyFamily("sd35", lambda: pipeline(dual_attention_layers=(0,), qk_norm="rms_norm"), inputs, CALL_3),
]
