"""Lumina-Image 2.0 with 2 blocks."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

from tiny._language import gemma2
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> Lumina2Pipeline:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=16,
    )
    with torch.no_grad():
        for layer in transformer.layers:
            layer.attn.norm_q.weight.fill_(4.0)  # the few tokens of a prompt stand out of those that all prompts share
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    return quiet(Lumina2Pipeline(lively(transformer), FlowMatchEulerDiscreteScheduler(), vae, gemma2(16), byte_tokenizer(48)))


CALL = {"height": 32, "width": 32, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily(
    name="lumina2",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={**CALL, "system_prompt": "", "max_sequence_length": 48},
    sign=-1,
)
