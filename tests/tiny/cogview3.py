"""CogView3-Plus with 2 blocks."""

import torch
from diffusers import CogVideoXDDIMScheduler, CogView3PlusPipeline, CogView3PlusTransformer2DModel

from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def transformer() -> CogView3PlusTransformer2DModel:
    torch.manual_seed(0)
    return CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=24,
        time_embed_dim=12,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )


def pipeline() -> CogView3PlusPipeline:
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return quiet(CogView3PlusPipeline(t5_tokenizer(), t5_encoder(24), tiny_vae(), lively(transformer()), scheduler))


FAMILY = TinyFamily(
    name="cogview3",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
)
