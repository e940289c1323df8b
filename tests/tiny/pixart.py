"""PixArtSigmaPipeline, and PixArtAlphaPipeline with the sizes that the α model at 1024 pixels is given."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.sd15 import CALL, inputs
from tiny.text import t5_encoder, t5_tokenizer


def pipeline(cls: type = PixArtSigmaPipeline, **overrides: Any) -> Any:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 24,
        "sample_size": 8,
        "caption_channels": 16,
    }
    return quiet(
        cls(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(16),
            vae=tiny_vae(),
            transformer=lively(PixArtTransformer2DModel(**{**config, **overrides})),
            scheduler=DPMSolverMultistepScheduler(beta_end=0.004),  # no noise so strong that its ε would be divided by 0.006
        )
    )


CALL_PIXART = {**CALL, "max_sequence_length": 16, "clean_caption": False, "use_resolution_binning": False}

FAMILIES = [
    TinyFamily("pixart", pipeline, inputs, CALL_PIXART),
    TinyFamily("pixart_alpha", lambda: pipeline(PixArtAlphaPipeline, sample_size=128), inputs, CALL_PIXART),
]
