"""Kandinsky 5.0, text to video, with a text block and 2 video blocks, as its models with a visual condition of zeros."""

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

from tiny._language import qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, clip_text, clip_tokenizer, prompts


def pipeline() -> Kandinsky5T2VPipeline:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 2, 2),
        visual_cond=True,
    )
    vae = AutoencoderKLHunyuanVideo(latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    text = (qwen25_vl(16), byte_tokenizer(256), clip_text(16), clip_tokenizer())
    pipe = Kandinsky5T2VPipeline(lively(transformer), vae.eval(), *text, scheduler)
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = "{}\n", 1
    return quiet(pipe)


CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily("kandinsky5", pipeline, lambda n: {"prompt": prompts(n)}, CALL)
