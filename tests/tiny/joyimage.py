"""JoyImage Edit and Edit Plus with 2 blocks, from text alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    JoyImageEditPipeline,
    JoyImageEditPlusPipeline,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
)
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tiny._language import TextProcessor, qwen3_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts
from tiny.wan import video_vae

SIZE = 32  # pixels; an eighth as many latents
CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "text_dim": 16,
    "mlp_width_ratio": 2.0,
    "num_layers": 2,
    "rope_dim_list": [4, 4, 4],
}


def text_encoder(width: int) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(0)
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = qwen3_vl(width).config.to_dict()
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision)).eval()


def small(pipe: Any, processor: str) -> Any:
    """With short templates, and pictures of their own size instead of one near 1024²."""
    vars(getattr(pipe, processor))["get_default_height_width"] = lambda image, *size: (SIZE, SIZE)
    pipe.prompt_template_encode = {"image": "{}\n", "multiple_images": "{}\n"}
    pipe.prompt_template_encode_start_idx = {"image": 1, "multiple_images": 0}
    return quiet(pipe)


def parts(transformer: Any) -> dict[str, Any]:
    tokenizer = byte_tokenizer(256)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=4.0),
        "vae": video_vae(),
        "text_encoder": text_encoder(16),
        "tokenizer": tokenizer,
        "transformer": lively(transformer).requires_grad_(False),  # torch rounds otherwise where it may need gradients
        "processor": TextProcessor(tokenizer),
    }


def edit() -> JoyImageEditPipeline:
    torch.manual_seed(0)
    return small(JoyImageEditPipeline(**parts(JoyImageEditTransformer3DModel(**CONFIG))), "vae_image_processor")


def edit_plus() -> JoyImageEditPlusPipeline:
    torch.manual_seed(0)
    return small(JoyImageEditPlusPipeline(**parts(JoyImageEditPlusTransformer3DModel(**CONFIG))), "image_processor")


CALL: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": 4, "output_type": "latent"}

FAMILIES = [
    TinyFamily("joyimage", edit, lambda n: {"prompt": prompts(n)}, CALL),
    TinyFamily("joyimage_plus", edit_plus, lambda n: {"prompt": prompts(n)}, CALL),
]
