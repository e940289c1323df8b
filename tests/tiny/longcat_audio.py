"""LongCat-AudioDiT with 2 blocks; a second is as long as its latents, and its result has `audios`, not `images`."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatAudioDiTPipeline,
    LongCatAudioDiTTransformer,
    LongCatAudioDiTVae,
)

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_tokenizer, umt5_encoder


def pipeline() -> LongCatAudioDiTPipeline:
    torch.manual_seed(0)
    transformer = LongCatAudioDiTTransformer(dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=12, latent_dim=4)
    vae = LongCatAudioDiTVae(
        channels=4, c_mults=[1, 2], strides=[2, 2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=4, sample_rate=32
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)
    return quiet(LongCatAudioDiTPipeline(vae.eval(), umt5_encoder(12), t5_tokenizer(), lively(transformer), scheduler))


FAMILY = TinyFamily(
    name="longcat_audio",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"audio_duration_s": 2.0, "num_inference_steps": 4, "output_type": "latent"},
)
