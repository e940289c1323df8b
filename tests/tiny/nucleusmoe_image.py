"""Nucleus-Image with a dense block and one of 2 experts."""

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    NucleusMoEImagePipeline,
    NucleusMoEImageTransformer2DModel,
)

from tiny._language import TextProcessor, qwen3
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> NucleusMoEImagePipeline:
    torch.manual_seed(0)
    transformer = NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
        mlp_ratio=12.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=20,
        capacity_factors=1.0,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = (lively(transformer), scheduler, vae.eval(), qwen3(12), TextProcessor(byte_tokenizer(64)))
    pipe = NucleusMoEImagePipeline(*parts)
    pipe.default_return_index = -2
    return quiet(pipe)


FAMILY = TinyFamily(
    name="nucleusmoe_image",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"},
    sign=-1,
)
