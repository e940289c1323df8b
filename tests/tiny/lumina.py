"""Lumina-Next with 2 blocks; its pipeline counts 8 pixels a latent."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline

from tiny._language import gemma2
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> LuminaPipeline:
    torch.manual_seed(0)
    transformer = LuminaNextDiT2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=12,
    )
    with torch.no_grad():
        for layer in transformer.layers:
            layer.gate.fill_(1.0)  # of what the text gives
        transformer.pad_token.zero_()
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(LuminaPipeline(lively(transformer), scheduler, vae.eval(), gemma2(12), byte_tokenizer(64)))


FAMILY = TinyFamily(
    name="lumina",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 48, "width": 48, "num_inference_steps": 4, "output_type": "latent", "clean_caption": False},
    sign=-1,
)
