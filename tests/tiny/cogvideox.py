"""CogVideoX with 2 blocks and rotary positions, as in its larger models."""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> CogVideoXPipeline:
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=2,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    lively(transformer, gains={"*.to_v.weight": 4.0})
    vae = AutoencoderKLCogVideoX(block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing"
    )
    return quiet(CogVideoXPipeline(t5_tokenizer(), t5_encoder(16), vae.eval(), transformer, scheduler))


CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily("cogvideox", pipeline, lambda n: {"prompt": prompts(n)}, {**CALL, "max_sequence_length": 16})
