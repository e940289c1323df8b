"""HunyuanVideo without guidance embeddings, as SkyReels-V1, with a block of two streams and one of one."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

from tiny._language import llama
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, clip_text, clip_tokenizer, prompts


def pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=False,
        text_embed_dim=24,
        pooled_projection_dim=12,
        rope_axes_dim=(4, 2, 2),
    )
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    return quiet(
        HunyuanVideoPipeline(
            text_encoder=llama(24, layers=3).model,
            tokenizer=byte_tokenizer(16),
            transformer=lively(transformer),
            vae=vae.eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=clip_text(12),
            tokenizer_2=clip_tokenizer(77),
        )
    )


CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16}

FAMILY = TinyFamily(
    name="hunyuanvideo",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={**CALL, "prompt_template": {"template": "{}", "crop_start": 0}},
    guided={"true_cfg_scale": 4.0, "negative_prompt": ""},
    off={"true_cfg_scale": 1.0},
)
