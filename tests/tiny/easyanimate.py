"""EasyAnimate with 2 blocks: one with weights of its own for the text, one that shares those of the video."""

from functools import partial

import torch
from diffusers import (
    AutoencoderKLMagvit,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)

from tiny._language import CHAT, qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> EasyAnimatePipeline:
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=12,
        text_embed_dim=16,
    )
    vae = AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, spatial_group_norm=False
    )
    tokenizer = byte_tokenizer(24)
    tokenizer.chat_template = CHAT.replace("message['content']", "message['content'][0]['text']")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipe = EasyAnimatePipeline(vae.eval(), qwen25_vl(16, text_only=True), tokenizer, lively(transformer), scheduler)
    pipe.encode_prompt = partial(pipe.encode_prompt, max_sequence_length=24)  # which its call does not pass on
    return quiet(pipe)


FAMILY = TinyFamily(
    name="easyanimate",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"},
    guided={"guidance_scale": 4.0, "negative_prompt": ""},
)
