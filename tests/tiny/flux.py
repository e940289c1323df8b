"""FLUX without guidance embeddings, a block of two streams and one of one, under true CFG."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer, prompts, t5_encoder, t5_tokenizer


def pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 2, 2),
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    text = (clip_text(12), clip_tokenizer(), t5_encoder(24), t5_tokenizer())
    return quiet(FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae, *text, lively(transformer)))


FAMILY = TinyFamily(
    name="flux",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
    guided={"true_cfg_scale": 4.0, "negative_prompt": ""},
    off={"true_cfg_scale": 1.0},
)
