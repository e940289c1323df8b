"""AuraFlowPipeline: joint blocks and single ones."""

from __future__ import annotations

import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.sd15 import CALL, inputs
from tiny.text import CHARACTERS, t5_tokenizer


def pipeline() -> AuraFlowPipeline:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return quiet(
        AuraFlowPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=lively(UMT5EncoderModel(UMT5Config(vocab_size=len(CHARACTERS) + 4, **sizes))),
            vae=tiny_vae(),
            transformer=lively(transformer, gains={"*.attn.to_out.0.weight": 8.0}),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


FAMILY = TinyFamily("auraflow", pipeline, inputs, {**CALL, "max_sequence_length": 16})
