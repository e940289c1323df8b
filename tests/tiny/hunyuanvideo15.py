"""HunyuanVideo 1.5 with 2 blocks. Its call has no guidance scale: `guided` and `off` are to be set on `pipe.guider`."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tiny._language import CHAT, qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> HunyuanVideo15Pipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=8,
        rope_axes_dim=(4, 2, 2),
        task_type="t2v",
    )
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    glyphs = T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    tokenizer = byte_tokenizer(32)
    tokenizer.chat_template = CHAT
    pipe = HunyuanVideo15Pipeline(
        text_encoder=qwen25_vl(16, layers=3, text_only=True),
        tokenizer=tokenizer,
        transformer=lively(transformer, gains={"*.add_v_proj.weight": 8.0}),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        text_encoder_2=glyphs.eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "film", 6  # <bos> and a line
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 32, 8, 4
    return quiet(pipe)


FAMILY = TinyFamily(
    name="hunyuanvideo15",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 8, "width": 8, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"},
)
