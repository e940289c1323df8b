"""StableDiffusionPipeline as of 1.5, and its siblings: image to image, inpainting, ControlNet, IP-Adapter."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import clip_text, clip_tokenizer, prompts

SIZE = 16  # pixels; half as many latents


def unet(channels: int = 4, **overrides: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    config: dict[str, Any] = {
        "sample_size": SIZE // 2,
        "in_channels": channels,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
    }
    return lively(UNet2DConditionModel(**{**config, **overrides}))


def scheduler() -> DDIMScheduler:
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def components(channels: int = 4) -> dict[str, Any]:
    return {
        "vae": tiny_vae(),
        "text_encoder": clip_text(16),
        "tokenizer": clip_tokenizer(),
        "unet": unet(channels),
        "scheduler": scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def pipeline() -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**components()))


def img2img() -> StableDiffusionImg2ImgPipeline:
    return quiet(StableDiffusionImg2ImgPipeline(**components()))


def inpaint(channels: int = 4) -> StableDiffusionInpaintPipeline:
    """channels: 4 for a plain UNet, 9 for one made for inpainting."""
    return quiet(StableDiffusionInpaintPipeline(**components(channels)))


def controlnet() -> StableDiffusionControlNetPipeline:
    parts = components()
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=lively(control, seed=1)))


def ip_adapter() -> StableDiffusionPipeline:
    """With one image adapter of 4 tokens and the encoder that it needs."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, image_size=SIZE, patch_size=8, projection_dim=8))
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pipe = StableDiffusionPipeline(**{**components(), "feature_extractor": processor}, image_encoder=lively(encoder))
    width = pipe.unet.config.cross_attention_dim
    projection = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    attentions = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(attention.inner_dim, width) / width**0.5
        for i, attention in enumerate(attentions)
        for part in "kv"
    }
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": keys}, subfolder="", weight_name="")
    return quiet(pipe)


def image(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def mask() -> Image.Image:
    """White, to be painted, on the right half."""
    pixels = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    pixels[:, SIZE // 2 :] = 255
    return Image.fromarray(pixels.numpy())


def inputs(count: int) -> dict[str, Any]:
    return {"prompt": prompts(count)}


CALL: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": 4, "output_type": "latent"}

FAMILY = TinyFamily("sd15", pipeline, inputs, CALL)

SIBLINGS = {
    family.name: family
    for family in (
        TinyFamily(
            "img2img",
            img2img,
            lambda count: {"prompt": prompts(count), "image": [image(i) for i in range(count)]},
            {"num_inference_steps": 4, "strength": 1.0, "output_type": "latent"},
        ),
        TinyFamily("inpaint", inpaint, lambda count: {**inputs(count), "image": image(), "mask_image": mask()}, CALL),
        TinyFamily(
            "inpaint_9", lambda: inpaint(9), lambda count: {**inputs(count), "image": image(), "mask_image": mask()}, CALL
        ),
        TinyFamily("controlnet", controlnet, lambda count: {**inputs(count), "image": [image(i) for i in range(count)]}, CALL),
        TinyFamily("ip_adapter", ip_adapter, lambda count: {**inputs(count), "ip_adapter_image": image()}, CALL),
    )
}
