"""Bria 3.2 with a block of two streams and one of one."""

import torch
from diffusers import BriaPipeline, BriaTransformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> BriaPipeline:
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=[4, 2, 2],
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(BriaPipeline(lively(transformer), scheduler, vae, t5_encoder(24), t5_tokenizer()))


FAMILY = TinyFamily(
    name="bria",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
)
