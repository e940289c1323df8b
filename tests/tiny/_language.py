"""Language models with random weights that encode text, for families whose text encoder is one."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BatchEncoding,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLTextConfig,
    Qwen3VLTextModel,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
)

CHAT = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"  # a chat template

_TINY = {"vocab_size": 260, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024}
_TINY |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.3, "tie_word_embeddings": True}


def qwen3(width: int, layers: int = 2, seed: int = 0) -> Qwen3Model:
    torch.manual_seed(seed)
    config = Qwen3Config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, head_dim=8, **_TINY)
    return Qwen3Model(config).eval()


def qwen3_vl(width: int, layers: int = 2, seed: int = 0) -> Qwen3VLTextModel:
    """Its text half, whose positions have three axes."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 8, **_TINY}
    return Qwen3VLTextModel(Qwen3VLTextConfig(rope_parameters=rope, **sizes)).eval()


def gemma2(width: int, layers: int = 2, seed: int = 0) -> Gemma2Model:
    torch.manual_seed(seed)
    config = Gemma2Config(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, head_dim=8, **_TINY)
    return Gemma2Model(config).eval()


def t5_gemma(width: int, layers: int = 2, seed: int = 0) -> T5GemmaEncoderModel:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 8, **_TINY}
    encoder = T5GemmaModuleConfig(**sizes)
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=encoder, decoder=encoder, is_encoder_decoder=False)).eval()


def llama(width: int, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, **_TINY)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()  # whose attention maps are asked for


def qwen25_vl(width: int, layers: int = 2, text_only: bool = False, seed: int = 0) -> PreTrainedModel:
    """The whole model, or its text half alone; 16 channels or a multiple, for three axes of RoPE."""
    torch.manual_seed(seed)
    rope = {
        "rope_type": "default",
        "mrope_section": [width // 4 - 2 * (width // 16), width // 16, width // 16],
        "rope_theta": 1e4,
    }
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "rope_parameters": rope, **_TINY}
    if text_only:
        return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**text)).eval()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


class TextProcessor:
    """Of a model that reads and sees, for text alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        """What the user says alone, so that prompts differ in more than their last tokens."""
        return "".join(part["text"] for part in messages[-1]["content"]) + "\n"

    def __call__(self, text: list[str], images: None = None, **options: Any) -> BatchEncoding:
        return self.tokenizer(text, return_token_type_ids=False, **options)
