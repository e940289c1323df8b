"""FLUX.2 [klein] base with a block of two streams and one of one; its text is that of two layers of the language model."""

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel

from tiny._language import CHAT, qwen3
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def vae_flux2() -> AutoencoderKLFlux2:
    """Latents [B, 4, H/2, W/2], which the pipelines pack by 2 × 2."""
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def pipeline() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=12,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )
    tokenizer = byte_tokenizer(16)
    tokenizer.chat_template = CHAT
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(Flux2KleinPipeline(scheduler, vae_flux2(), qwen3(12), tokenizer, lively(transformer)))


FAMILY = TinyFamily(
    name="flux2",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={
        "height": 16,
        "width": 16,
        "num_inference_steps": 4,
        "output_type": "latent",
        "max_sequence_length": 16,
        "text_encoder_out_layers": (1, 2),
    },
)
