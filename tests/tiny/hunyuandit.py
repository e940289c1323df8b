"""Hunyuan-DiT with 4 blocks, of which the last takes what the first gave; its pipeline counts 8 pixels a latent, 77 and 256
tokens."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline
from transformers import BertConfig, BertModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts, t5_encoder, t5_tokenizer


def pipeline() -> HunyuanDiTPipeline:
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=24,
        pooled_projection_dim=20,
    )
    bert = BertConfig(vocab_size=260, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
    )
    betas = {"beta_start": 0.00085, "beta_end": 0.02, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    return quiet(
        HunyuanDiTPipeline(
            vae=vae.eval(),
            text_encoder=lively(BertModel(bert)),
            tokenizer=byte_tokenizer(77),
            transformer=lively(transformer),
            scheduler=DDPMScheduler(**betas, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5_encoder(24),
            tokenizer_2=t5_tokenizer(256),
        )
    )


FAMILY = TinyFamily(
    name="hunyuandit",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 48, "width": 48, "num_inference_steps": 4, "output_type": "latent", "use_resolution_binning": False},
)
