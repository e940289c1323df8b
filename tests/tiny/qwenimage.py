"""Qwen-Image with 2 blocks; the prompt's template is cut to a line, so that prompts differ in more than their last tokens."""

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from tiny._language import qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> QwenImagePipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    lively(transformer, gains={"*.add_v_proj.weight": 3.0})
    vae = AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = QwenImagePipeline(scheduler, vae.eval(), qwen25_vl(16), byte_tokenizer(1024), transformer)
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}\n", 1
    return quiet(pipe)


FAMILY = TinyFamily(
    name="qwenimage",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"},
    guided={"true_cfg_scale": 4.0, "negative_prompt": " "},
    off={"true_cfg_scale": 1.0},
)
