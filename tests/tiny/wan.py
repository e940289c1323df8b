"""Wan with 2 blocks: 2.1, and 2.2 with a transformer for each half of the steps."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_tokenizer

SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}


def transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return lively(WanTransformer3DModel(**SIZES), seed)


def umt5_encoder(width: int) -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0)
    return lively(UMT5EncoderModel(config))


def video_vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return vae.eval()


def pipeline(boundary_ratio: float | None = None) -> WanPipeline:
    return quiet(
        WanPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=umt5_encoder(16),
            vae=video_vae(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer=transformer(0),
            transformer_2=None if boundary_ratio is None else transformer(1),
            boundary_ratio=boundary_ratio,
        )
    )


CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16}

FAMILIES = [
    TinyFamily("wan", pipeline, lambda n: {"prompt": prompts(n)}, CALL),
    TinyFamily(
        "wan22",
        lambda: pipeline(boundary_ratio=0.875),
        lambda n: {"prompt": prompts(n)},
        CALL,
        guided={"guidance_scale": 4.0, "guidance_scale_2": 3.0},
        off={"guidance_scale": 1.0, "guidance_scale_2": 1.0},
    ),
]
