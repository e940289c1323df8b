"""Text encoders, tokenizers and vocoders with random weights, as pipelines of sound have them."""

from __future__ import annotations

import json
from typing import Any

import torch
from transformers import (
    ClapAudioConfig,
    ClapConfig,
    ClapModel,
    ClapTextConfig,
    ClapTextModelWithProjection,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from tiny._parts import lively
from tiny.text import CHARACTERS, read_back

PIECES = ("<s>", "<pad>", "</s>", "<unk>", "<mask>", *CHARACTERS, "Ġ")


def roberta_tokenizer(length: int = 16) -> RobertaTokenizer:
    vocabulary = json.dumps({piece: i for i, piece in enumerate(PIECES)})
    return read_back(RobertaTokenizer, {"vocab.json": vocabulary, "merges.txt": ""}, model_max_length=length)


def _clap_text(width: int) -> ClapTextConfig:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": width}
    return ClapTextConfig(vocab_size=len(PIECES), num_hidden_layers=2, num_attention_heads=2, **sizes)


def clap_text(width: int) -> ClapTextModelWithProjection:
    torch.manual_seed(0)
    return lively(ClapTextModelWithProjection(_clap_text(width)))


def clap(width: int) -> ClapModel:
    """One embedding of a text, and what such of sounds are made of."""
    torch.manual_seed(0)
    audio = ClapAudioConfig(
        spec_size=16,
        num_mel_bins=4,
        window_size=2,
        patch_size=2,
        patch_stride=2,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        num_hidden_layers=2,
        hidden_size=8,
        patch_embeds_hidden_size=4,
        projection_dim=width,
    )
    text = _clap_text(width)
    return lively(ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=width)))


def vocoder(bins: int = 8) -> SpeechT5HifiGan:
    """Four samples a row of the spectrogram, eight rows a second."""
    torch.manual_seed(0)
    config = SpeechT5HifiGanConfig(
        model_in_dim=bins,
        sampling_rate=32,
        upsample_initial_channel=8,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3],
        resblock_dilation_sizes=[[1, 3, 5]],
        normalize_before=False,
    )
    return lively(SpeechT5HifiGan(config))
