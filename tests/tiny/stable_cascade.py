"""Stable Cascade: the prior with 2 resolutions, and the decoder with a block that runs twice and one without attention."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer, prompts

CONVOLUTIONS = ("SDCascadeResBlock", "SDCascadeTimestepBlock")


def unet(**changes: Any) -> StableCascadeUNet:
    torch.manual_seed(0)
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "timestep_ratio_embedding_dim": 12,
        "conditioning_dim": 24,
        "block_out_channels": (8, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1),
        "clip_text_pooled_in_channels": 16,
        "clip_seq": 2,
    }
    return lively(StableCascadeUNet(**{**config, **changes}))


def prior() -> StableCascadePriorPipeline:
    model = unet(clip_text_in_channels=20, clip_image_in_channels=8, switch_level=(False,))
    scheduler = DDPMWuerstchenScheduler()
    return quiet(StableCascadePriorPipeline(clip_tokenizer(), clip_text(20, 16), model, scheduler, resolution_multiple=4.0))


def decoder() -> StableCascadeDecoderPipeline:
    torch.manual_seed(0)
    vqgan = PaellaVQModel(levels=2, bottleneck_blocks=1, embed_dim=8, latent_channels=4, num_vq_embeddings=8)
    model = unet(
        effnet_in_channels=4,
        timestep_conditioning_type=("sca",),
        num_attention_heads=(-1, 2),
        block_types_per_layer=(CONVOLUTIONS, (*CONVOLUTIONS, "SDCascadeAttnBlock")),
        up_blocks_repeat_mappers=(2, 1),
    )
    text = clip_text(20, 16)
    pipe = StableCascadeDecoderPipeline(
        model, clip_tokenizer(), text, DDPMWuerstchenScheduler(), vqgan.eval(), latent_dim_scale=4
    )
    return quiet(pipe)


def combined() -> StableCascadeCombinedPipeline:
    """Both in one, whose own call has a guidance scale for each."""
    first, second = prior(), decoder()
    parts = {name: getattr(second, name) for name in ("tokenizer", "text_encoder", "decoder", "scheduler", "vqgan")}
    parts |= {f"prior_{name}": getattr(first, name) for name in ("prior", "text_encoder", "tokenizer", "scheduler")}
    return quiet(StableCascadeCombinedPipeline(**parts, prior_image_encoder=None, prior_feature_extractor=None))


def embeddings(count: int) -> dict[str, Any]:
    """What the prior would give, [1, C, H, W] each."""
    return {
        "prompt": prompts(count),
        "image_embeddings": [*torch.randn(count, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))],
    }


STEPS = {"num_inference_steps": 4}

FAMILIES = [
    TinyFamily("stable_cascade_prior", prior, lambda n: {"prompt": prompts(n)}, {**STEPS, "height": 32, "width": 32}),
    TinyFamily("stable_cascade_decoder", decoder, embeddings, {**STEPS, "output_type": "latent"}),
]
