"""Mochi with 2 blocks, of which the last leaves the text as it is."""

import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> MochiPipeline:
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=12,
        in_channels=12,
        text_embed_dim=24,
        time_embed_dim=10,
    )
    with torch.no_grad():
        transformer.pos_frequencies.normal_()
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1, 1, 1, 1, 1)
    )
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return quiet(MochiPipeline(scheduler, vae.eval(), t5_encoder(24), t5_tokenizer(), lively(transformer)))


CALL = {"height": 32, "width": 32, "num_frames": 7, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily("mochi", pipeline, lambda n: {"prompt": prompts(n)}, {**CALL, "max_sequence_length": 16})
