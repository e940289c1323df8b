"""Tokenizers of single characters and text encoders with random weights: any prompt can be encoded, offline."""

from __future__ import annotations

import json
import string
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from tiny._parts import lively

Kind = TypeVar("Kind", bound=PreTrainedTokenizerBase)

CHARACTERS = string.ascii_lowercase + string.digits + ".,!?-"
COLOURS = ("red", "green", "blue", "black", "white", "golden", "pale")
THINGS = ("cat", "house", "tree", "ship", "lamp")


def prompts(count: int) -> list[str]:
    """`count` different prompts, up to 35."""
    return [f"{COLOURS[i % len(COLOURS)]} {THINGS[i % len(THINGS)]}" for i in range(count)]


def read_back(kind: type[Kind], files: dict[str, str], **settings: Any) -> Kind:
    """A tokenizer by its files, by name: what constructors take differs between versions of transformers."""
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        return kind.from_pretrained(folder, **settings)


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    pieces = [*CHARACTERS, *(f"{character}</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({piece: i for i, piece in enumerate(pieces)})
    return read_back(CLIPTokenizer, {"vocab.json": vocabulary, "merges.txt": ""}, model_max_length=length)


def clip_text(width: int, projection: int | None = None, seed: int = 0) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Embeddings of `width`; pooled ones of `projection` where it is given."""
    torch.manual_seed(seed)
    ends = 2 * len(CHARACTERS)
    config = CLIPTextConfig(
        vocab_size=ends + 2,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=projection or width,
        bos_token_id=ends,
        eos_token_id=ends + 1,
        pad_token_id=ends + 1,
    )
    return lively((CLIPTextModel if projection is None else CLIPTextModelWithProjection)(config), seed)


def t5_tokenizer(length: int = 16) -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -1.0) for character in "▁" + CHARACTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return read_back(T5TokenizerFast, {"tokenizer.json": tokenizer.to_str()}, extra_ids=0, model_max_length=length)


def t5_encoder(width: int, seed: int = 0) -> T5EncoderModel:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(CHARACTERS) + 4, d_model=width, d_kv=8, d_ff=2 * width, num_layers=2, num_heads=2, dropout_rate=0.0
    )
    return lively(T5EncoderModel(config), seed)


def umt5_encoder(width: int, seed: int = 0) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": 2, "num_heads": 2}
    return lively(UMT5EncoderModel(UMT5Config(vocab_size=len(CHARACTERS) + 4, dropout_rate=0.0, **sizes)), seed)


def byte_tokenizer(length: int = 16, padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A token a byte, ids 4 … 259, behind <bos>; for text encoders that are language models."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {piece: i for i, piece in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, padding_side=padding_side, **names)
