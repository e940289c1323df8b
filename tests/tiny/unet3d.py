"""ModelScope's text to video on a U-Net of one level."""

from __future__ import annotations

import torch
from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

from tiny import sd15
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer


def unet() -> UNet3DConditionModel:
    torch.manual_seed(0)
    model = UNet3DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock3D",),
        up_block_types=("CrossAttnUpBlock3D",),
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    model = lively(model, gains={"conv_out.weight": 0.25, "*.attentions.*.attn2.to_v.weight": 3.0})
    return model.requires_grad_(False)  # torch rounds otherwise where it may need gradients


def pipeline() -> TextToVideoSDPipeline:
    return quiet(TextToVideoSDPipeline(tiny_vae(), clip_text(12), clip_tokenizer(), unet(), sd15.scheduler()))


FAMILY = TinyFamily("unet3d", pipeline, sd15.inputs, {**sd15.CALL, "height": 8, "width": 8, "num_frames": 2})
