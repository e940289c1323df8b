"""CogView4Pipeline: two forwards a step, whose texts differ in length: 32 tokens and 16."""

from __future__ import annotations

import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import GlmConfig, GlmModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.sd15 import CALL
from tiny.text import byte_tokenizer, prompts


def pipeline() -> CogView4Pipeline:
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        sample_size=8,
    )
    text = GlmConfig(
        vocab_size=260,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    flow = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "use_dynamic_shifting": True}
    return quiet(
        CogView4Pipeline(
            tokenizer=byte_tokenizer(padding_side="left"),
            text_encoder=lively(GlmModel(text)),
            vae=tiny_vae(),
            transformer=lively(transformer, gains={"*.attn1.to_out.0.weight": 4.0}),
            scheduler=FlowMatchEulerDiscreteScheduler(**flow, time_shift_type="linear"),
        )
    )


FAMILY = TinyFamily(
    "cogview4",
    pipeline,
    lambda count: {"prompt": [f"{prompt}, {prompt}" for prompt in prompts(count)]},
    {**CALL, "max_sequence_length": 64},
)
