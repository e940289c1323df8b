"""Ovis-Image with a block of two streams and one of one."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, OvisImagePipeline, OvisImageTransformer2DModel

from tiny._language import CHAT, qwen3
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> OvisImagePipeline:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    tokenizer = byte_tokenizer(32)
    tokenizer.chat_template = CHAT
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = OvisImagePipeline(scheduler, vae, qwen3(12), tokenizer, lively(transformer))
    pipe.system_prompt, pipe.user_prompt_begin_id = "see ", 4
    return quiet(pipe)


FAMILY = TinyFamily(
    name="ovis_image",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
)
