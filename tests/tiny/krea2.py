"""Krea 2 with 2 blocks; its text is that of two layers of the language model."""

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Pipeline, Krea2Transformer2DModel

from tiny._language import qwen3_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> Krea2Pipeline:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        timestep_embed_dim=20,
        text_hidden_dim=12,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=20,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
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
    parts = (scheduler, vae.eval(), qwen3_vl(12), byte_tokenizer(64), lively(transformer))
    pipe = Krea2Pipeline(*parts, text_encoder_select_layers=(1, 2))
    pipe.prompt_template_encode_prefix, pipe.prompt_template_encode_start_idx = "", 1  # <bos>
    pipe.prompt_template_encode_suffix, pipe.prompt_template_encode_num_suffix_tokens = "\n", 2
    return quiet(pipe)


FAMILY = TinyFamily(
    name="krea2",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
    guided={"guidance_scale": 3.0},
    off={"guidance_scale": 0.0},
    omega_offset=1.0,
)
