"""ERNIE-Image with 2 blocks, and another language model than its own, which is called alike."""

import torch
from diffusers import ErnieImagePipeline, ErnieImageTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny._language import qwen3
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.flux2 import vae_flux2
from tiny.text import byte_tokenizer, prompts


def pipeline() -> ErnieImagePipeline:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=24,
        in_channels=16,
        out_channels=16,
        text_in_dim=12,
        rope_axes_dim=(4, 2, 2),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(ErnieImagePipeline(lively(transformer), vae_flux2(), qwen3(12), byte_tokenizer(16), scheduler))


FAMILY = TinyFamily(
    name="ernie_image",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"},
)
