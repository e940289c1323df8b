"""`agd.distill` as a user calls it, under a cap: states, training, validation and pictures of a pipeline with random weights."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import agd_fast as agd
from memory.rows import EAGER, Row, empty_row
from memory.students import ADAPTERS
from memory.training import cap
from speed.architectures import Architecture, build, find_architecture

SHORT = {
    "trajectories": 2,
    "shard_size": 1,
    "sampling_steps": 3,
    "validation": 1,
    "validate_every": 1,
    "guidance_range": (1.0, 2.0),
}
PROMPTS = ["a red cat", "a green house"]


def sdxl(architecture: Architecture, device: torch.device, dtype: torch.dtype) -> diffusers.StableDiffusionXLPipeline:
    """The published pipeline, except for random weights and tokenizers that know only characters."""
    text = {"vocab_size": 49408, "bos_token_id": 72, "eos_token_id": 73, "pad_token_id": 73}
    first = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    second = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    blocks = len(channels := (128, 256, 512, 512))
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=1024,
        scaling_factor=0.13025,
    )
    scheduler, config = architecture.scheduler
    encoder = CLIPTextModel(CLIPTextConfig(**text, **first))
    projecting = CLIPTextModelWithProjection(CLIPTextConfig(**text, **second, projection_dim=1280, hidden_act="gelu"))
    return diffusers.StableDiffusionXLPipeline(
        vae=vae.to(dtype),
        text_encoder=encoder.to(dtype),
        text_encoder_2=projecting.to(dtype),
        tokenizer=_characters(),
        tokenizer_2=_characters(),
        unet=build(architecture, device, dtype),
        scheduler=getattr(diffusers, scheduler)(**config),
        add_watermarker=False,
    )


def _characters() -> CLIPTokenizer:
    known = string.ascii_lowercase + string.digits
    pieces = [*known, *(f"{character}</w>" for character in known), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({piece: index for index, piece in enumerate(pieces)}, [], model_max_length=77)


PIPELINES: dict[str, Callable[[Architecture, torch.device, torch.dtype], Any]] = {"sdxl-1024": sdxl}


def whole_row(row: Row, pipe: Any = None, **settings: Any) -> Row:
    """`row` with its figures; the note says where memory ran out. The cap is set while the models are on the CPU.

    pipe: None builds the pipeline of the row's model. settings: further arguments of `distill`.
    """
    device, found = torch.device(row["device"]), empty_row(row)
    if pipe is None:
        architecture = find_architecture(row["model"])
        pipe = PIPELINES[row["model"]](architecture, device, getattr(torch, row["dtype"])).to("cpu")
        adapter = ADAPTERS[row["adapter"]][1](architecture)
        size = 8 * architecture.sample[-1]
        settings = {"adapter": adapter, "call": {"height": size, "width": size}, **settings}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        cap(row["cap_bytes"], device)
    train = agd.TrainConfig(steps=2, batch_size=max(2, row["batch"]), micro_batch_size=row["batch"], log_every=1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = agd.distill(
                pipe,
                prompts=PROMPTS,
                output_dir=folder,
                memory=None if row["mode"] == EAGER else row["mode"],
                base_weights=row["base"],
                train_config=train,
                progress=False,
                **{**SHORT, **settings},
            )
        except torch.OutOfMemoryError as error:
            return {**found, "note": f"out of memory: {str(error).splitlines()[0]}"[:200]}
    memory = result.memory or {}
    peaks = dict(memory.get("peak_bytes", {}))
    if device.type == "cuda":
        peaks["draw"] = torch.cuda.max_memory_allocated(device)
        found |= {"peak_bytes": max(peaks.values()), "reserved_bytes": torch.cuda.max_memory_reserved(device)}
    phases = {"seconds": result.seconds, "peak_bytes": peaks, "streamed": memory.get("streamed", False)}
    return {**found, "parameters": result.parameters, "loss": result.loss, "phases": phases}
