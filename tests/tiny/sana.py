"""SanaPipeline: text of a small Gemma, a scheduler of several steps on a flow."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from tiny._language import gemma2
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.sd15 import inputs
from tiny.text import byte_tokenizer


def pipeline() -> SanaPipeline:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    blocks = {"block_out_channels": (4, 4, 4), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in blocks.items()}
    return quiet(
        SanaPipeline(
            tokenizer=byte_tokenizer(),
            text_encoder=gemma2(16),
            vae=AutoencoderDC(latent_channels=4, **sides).eval(),
            transformer=lively(transformer),
            scheduler=DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )
    )


FAMILY = TinyFamily(
    "sana",
    pipeline,
    inputs,
    {
        "height": 32,
        "width": 32,
        "num_inference_steps": 4,
        "output_type": "latent",
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
)
