"""Z-Image with 2 blocks."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

from tiny._language import CHAT, qwen3
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 16, 16],
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    tokenizer = byte_tokenizer(32)
    tokenizer.chat_template = CHAT
    return quiet(ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, qwen3(16), tokenizer, lively(transformer)))


FAMILY = TinyFamily(
    name="zimage",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 32},
    guided={"guidance_scale": 3.0},
    off={"guidance_scale": 0.0},
    omega_offset=1.0,
    sign=-1,
)
