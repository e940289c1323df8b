"""Kandinsky 2.1 and 2.2: the prior with 2 blocks, and the decoders at one resolution."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.kandinsky import MultilingualCLIP
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny import deepfloyd_if
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer, prompts, t5_tokenizer

PICTURE = 12  # channels of a picture's embedding


def unet(**changes: Any) -> UNet2DConditionModel:
    """As DeepFloyd IF's, but for what it is conditioned on."""
    config: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 8,
        "down_block_types": ("SimpleCrossAttnDownBlock2D",),
        "up_block_types": ("SimpleCrossAttnUpBlock2D",),
        "block_out_channels": (8,),
        "encoder_hid_dim": PICTURE,
        "encoder_hid_dim_type": "image_proj",
        "addition_embed_type": "image",
        "cross_attention_norm": None,
        "act_fn": "silu",
    }
    gains = {"conv_out.weight": 0.25, "*.add_v_proj.weight": 4.0}
    model = lively(deepfloyd_if.unet(**{**config, **changes}), gains=gains)
    return model.requires_grad_(False)  # torch rounds otherwise where it may need gradients


def movq() -> VQModel:
    torch.manual_seed(0)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        num_vq_embeddings=8,
        norm_num_groups=2,
    )
    return model.eval()


def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, variance_type="learned_range", clip_sample=False)


def decoder(cls: type = KandinskyV22Pipeline, **changes: Any) -> Any:
    """A pipeline of 2.2; changes: of its U-Net's config."""
    return quiet(cls(unet=unet(**changes), scheduler=scheduler(), movq=movq()))


def controlnet() -> KandinskyV22ControlnetPipeline:
    return decoder(KandinskyV22ControlnetPipeline, in_channels=8, addition_embed_type="image_hint")


def unet21(**changes: Any) -> UNet2DConditionModel:
    kinds = {"encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image"}
    return unet(encoder_hid_dim=24, cross_attention_dim=PICTURE, **kinds, **changes)  # that of both embeddings


def decoder21() -> KandinskyPipeline:
    """Its scheduler has no use for the learned sigma."""
    torch.manual_seed(0)
    text = MCLIPConfig(
        transformerDimSize=24,
        imageDimSize=PICTURE,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
    )
    steps = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return quiet(KandinskyPipeline(lively(MultilingualCLIP(text)), t5_tokenizer(77), unet21(), steps, movq()))


def prior() -> KandinskyV22PriorPipeline:
    torch.manual_seed(0)
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=PICTURE, num_embeddings=16)
    model.clip_std.data.fill_(1.0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, image_size=16, patch_size=8, projection_dim=PICTURE))
    return quiet(
        KandinskyV22PriorPipeline(
            lively(model),
            lively(encoder),
            clip_text(PICTURE, PICTURE),
            clip_tokenizer(),
            UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", clip_sample_range=5.0),
            image_processor=None,
        )
    )


def combined() -> KandinskyV22CombinedPipeline:
    """Both in one, whose own call has two guidance scales."""
    second = decoder()
    parts = {name: getattr(second, name) for name in ("unet", "scheduler", "movq")}
    parts |= {f"prior_{name}": part for name, part in prior().components.items()}
    return KandinskyV22CombinedPipeline(**parts)


def inpainting21() -> KandinskyInpaintPipeline:
    """The U-Net sees the mask and what it leaves beside the latents."""
    first = decoder21()
    parts = {name: part for name, part in first.components.items() if name != "unet"}
    return quiet(KandinskyInpaintPipeline(**parts, unet=unet21(in_channels=4 + 1 + 4)))


def pictures(count: int) -> dict[str, Any]:
    """What the prior would give, [1, D] each."""
    first, *others = (torch.randn(1, PICTURE, generator=torch.Generator().manual_seed(seed)) for seed in range(count + 1))
    return {"image_embeds": others, "negative_image_embeds": [first] * count}


CALL: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"}

FAMILIES = [
    TinyFamily("kandinsky22", decoder, pictures, CALL),
    TinyFamily("kandinsky_prior", prior, lambda n: {"prompt": prompts(n)}, {"num_inference_steps": 4, "output_type": "pt"}),
]
