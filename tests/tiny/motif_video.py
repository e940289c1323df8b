"""Motif-Video with a block of two streams, one of one, and one of its decoder. Its guider holds the guidance scale."""

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer
from tiny.wan import CALL, video_vae


def pipeline() -> MotifVideoPipeline:
    torch.manual_seed(0)
    transformer = MotifVideoTransformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=2,
        num_decoder_layers=1,
        text_embed_dim=24,
        rope_axes_dim=(4, 2, 2),
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    )
    return quiet(
        MotifVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            vae=video_vae(),
            text_encoder=t5_encoder(24),
            tokenizer=t5_tokenizer(),
            transformer=lively(transformer),
            guider=ClassifierFreeGuidance(guidance_scale=4.0),
        )
    )


FAMILY = TinyFamily("motif_video", pipeline, lambda n: {"prompt": prompts(n)}, CALL)
