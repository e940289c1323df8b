"""DeepFloyd IF, its first stage: pictures of pixels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "encoder_hid_dim": 24,
        "cross_attention_dim": 32,
        "cross_attention_norm": "group_norm",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 2,
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "gelu",
    }
    return lively(UNet2DConditionModel(**{**config, **changes}))


def parts(**changes: Any) -> dict[str, Any]:
    return {
        "tokenizer": t5_tokenizer(),
        "text_encoder": t5_encoder(24),
        "unet": unet(**changes),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "watermarker": None,
        "requires_safety_checker": False,
    }


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range", clip_sample=False)


def pipeline() -> IFPipeline:
    return quiet(IFPipeline(**parts()))


FAMILY = TinyFamily(
    name="deepfloyd_if",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"num_inference_steps": 4, "output_type": "pt", "clean_caption": False},
)
