"""Cosmos 2.5, text to video, with 2 blocks. It guides for scales above 1, at ω = scale + 1."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    Cosmos2_5_PredictBasePipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    EDMEulerScheduler,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers import transformer_cosmos
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

from tiny._language import qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts, t5_encoder, t5_tokenizer
from tiny.wan import CALL, video_vae

USER = "{% for message in messages if message['role'] == 'user' %}{{ message['content'][0]['text'] }}{% endfor %}"


def resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
    return F.interpolate(mask, size, mode=interpolation)


# torchvision's, with which the transformer sizes its padding mask
vars(transformer_cosmos).setdefault(
    "transforms",
    SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")),
)


class Guardrail:
    """In the place of Cosmos' own, which the pipeline asks for."""

    def to(self, device: Any) -> Guardrail:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True


def tokenizer() -> PreTrainedTokenizerFast:
    found = byte_tokenizer(16)
    found.chat_template = USER
    return found


def pipeline() -> Cosmos2_5_PredictBasePipeline:
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=20,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=2 * 16,
        encoder_hidden_states_channels=20,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    parts = (qwen25_vl(16), tokenizer(), lively(transformer), video_vae(), scheduler, Guardrail())
    return quiet(Cosmos2_5_PredictBasePipeline(*parts))


def first_cosmos() -> CosmosTextToWorldPipeline:
    """Cosmos 1, whose scheduler makes x_0 of both predictions before it combines them."""
    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=24,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        extra_pos_embed_type=None,
    )
    vae = video_vae()
    vae.register_to_config(temporal_compression_ratio=4, spatial_compression_ratio=8)
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min")
    return quiet(CosmosTextToWorldPipeline(t5_encoder(24), t5_tokenizer(), lively(transformer), vae, scheduler, Guardrail()))


FAMILY = TinyFamily("cosmos", pipeline, lambda n: {"prompt": prompts(n)}, CALL, omega_offset=1.0)
