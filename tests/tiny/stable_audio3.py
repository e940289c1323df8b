"""Stable Audio 3 with 2 blocks; its result has `audios`, not `images`."""

import torch
from diffusers import AutoencoderSAME, FlowMatchEulerDiscreteScheduler, StableAudio3DiTModel, StableAudio3Pipeline
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

from tiny._language import t5_gemma
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> StableAudio3Pipeline:
    torch.manual_seed(0)
    transformer = StableAudio3DiTModel(
        io_channels=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=8,
        num_memory_tokens=2,
    )
    transformer.timestep_features.max_freq = 10.0  # of 10000, float32 holds too few digits of the phases
    vae = AutoencoderSAME(
        patch_size=2,
        encoder_channels=4,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=4,
        dim_heads=4,
        sampling_rate=32,
    )
    return quiet(
        StableAudio3Pipeline(
            vae=vae.eval(),
            text_encoder=t5_gemma(12),
            tokenizer=byte_tokenizer(16),
            duration_embedder=lively(StableAudio3DurationEmbedder(output_dim=12, fourier_dim=8), seed=1),
            transformer=lively(transformer),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1),
        )
    )


FAMILY = TinyFamily(
    name="stable_audio3",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"duration": 2.0, "num_inference_steps": 4, "output_type": "latent"},
)
