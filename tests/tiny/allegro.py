"""Allegro with 2 blocks."""

import torch
from diffusers import AllegroPipeline, AllegroTransformer3DModel, AutoencoderKLAllegro, DDIMScheduler

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> AllegroPipeline:
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=16,
    )
    vae = AutoencoderKLAllegro(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=32)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear")
    pipe = AllegroPipeline(t5_tokenizer(), t5_encoder(16), vae.eval(), lively(transformer), scheduler)
    pipe.vae.enable_tiling()
    return quiet(pipe)


CALL = {"height": 32, "width": 32, "num_frames": 8, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily(
    "allegro", pipeline, lambda n: {"prompt": prompts(n)}, {**CALL, "max_sequence_length": 16, "clean_caption": False}
)
