"""Latte with 2 blocks: one over the patches of a frame, one over the frames of a patch."""

import torch
from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> LattePipeline:
    torch.manual_seed(0)
    transformer = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=12,
        video_length=3,
    )
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    return quiet(LattePipeline(t5_tokenizer(), t5_encoder(12), tiny_vae(), lively(transformer), scheduler))


FAMILY = TinyFamily(
    name="latte",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={
        "height": 16,
        "width": 16,
        "video_length": 3,
        "num_inference_steps": 4,
        "output_type": "latent",
        "clean_caption": False,
        "mask_feature": False,
    },
)
