"""SkyReels-V2 with 2 blocks."""

from types import SimpleNamespace

import torch
from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_tokenizer
from tiny.wan import CALL, umt5_encoder, video_vae

vars(pipeline_skyreels_v2).setdefault("ftfy", SimpleNamespace(fix_text=str))  # called whether it is installed or not


def pipeline() -> SkyReelsV2Pipeline:
    torch.manual_seed(0)
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=10,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return quiet(SkyReelsV2Pipeline(t5_tokenizer(), umt5_encoder(16), lively(transformer), video_vae(), scheduler))


FAMILY = TinyFamily("skyreels", pipeline, lambda n: {"prompt": prompts(n)}, CALL)
