"""SANA-Video with 2 blocks: text of a small Gemma, a scheduler of several steps on a flow."""

import torch
from diffusers import DPMSolverMultistepScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel

from tiny._language import gemma2
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts
from tiny.wan import CALL, video_vae


def pipeline() -> SanaVideoPipeline:
    torch.manual_seed(0)
    transformer = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        rope_max_seq_len=32,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    return quiet(SanaVideoPipeline(byte_tokenizer(), gemma2(16), video_vae(), lively(transformer), scheduler))


FAMILY = TinyFamily(
    name="sana_video",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={
        **{name: value for name, value in CALL.items() if name != "num_frames"},
        "frames": 5,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    },
)
