"""DiTPipeline: 1000 classes, as it has 1000 for the null label; channels of a learned sigma; no output_type="latent"."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily


def pipeline() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=2,
    )
    return quiet(DiTPipeline(lively(transformer), tiny_vae(), DDIMScheduler(clip_sample=False)))


FAMILY = TinyFamily(
    "dit",
    pipeline,
    lambda count: {"class_labels": [7 * i for i in range(count)]},
    {"num_inference_steps": 4, "output_type": "pt"},
)
