"""StableAudioPipeline: latents [B, C, T]; its result has `audios`, not `images`, and no other size than the model's."""

from __future__ import annotations

import torch
from diffusers import AutoencoderOobleck, EDMDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
from diffusers.pipelines.stable_audio import StableAudioProjectionModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.sd15 import inputs
from tiny.text import t5_encoder, t5_tokenizer


def pipeline() -> StableAudioPipeline:
    torch.manual_seed(0)
    transformer = StableAudioDiTModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    sizes = {"encoder_hidden_size": 4, "channel_multiples": [1, 2], "decoder_channels": 4, "decoder_input_channels": 4}
    return quiet(
        StableAudioPipeline(
            vae=AutoencoderOobleck(**sizes, downsampling_ratios=[2, 2], audio_channels=2, sampling_rate=4).eval(),
            text_encoder=t5_encoder(16),
            projection_model=lively(StableAudioProjectionModel(16, 16, min_value=0, max_value=512), seed=1),
            tokenizer=t5_tokenizer(),
            transformer=lively(transformer),
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"
            ),
        )
    )


FAMILY = TinyFamily("stable_audio", pipeline, inputs, {"num_inference_steps": 4, "output_type": "latent"})
