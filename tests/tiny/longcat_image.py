"""LongCat-Image with a block of two streams and one of one; its pipeline is made for latents of 16 channels."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LongCatImagePipeline, LongCatImageTransformer2DModel

from tiny._language import qwen25_vl
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> LongCatImagePipeline:
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 4],
    )
    vae = tiny_vae(16)
    vae.register_to_config(shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = LongCatImagePipeline(scheduler, vae, qwen25_vl(16), byte_tokenizer(16), None, lively(transformer))
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_suffix, pipe.tokenizer_max_length = "see\n", "\n", 16
    return quiet(pipe)


FAMILY = TinyFamily(
    name="longcat_image",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "enable_prompt_rewrite": False},
)
