"""Bria FIBO 2 with a refiner and a block that reads the text; the resampler makes 4 or 8 tokens of it."""

import torch
from diffusers import BriaFibo2Pipeline, BriaFibo2Transformer2DModel, FlowMatchEulerDiscreteScheduler

from tiny._language import TextProcessor, qwen3
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.flux2 import vae_flux2
from tiny.text import byte_tokenizer, prompts


def pipeline() -> BriaFibo2Pipeline:
    torch.manual_seed(0)
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=32,
        injection_layer_ids=(0,),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=4,
        gist_min_text_len=10,
        gist_max_text_len=20,
        axes_dims=(4, 4, 4),
        axes_lens=(32, 16, 16),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = BriaFibo2Pipeline(lively(transformer), scheduler, vae_flux2(), qwen3(16), TextProcessor(byte_tokenizer(64)))
    pipe.prompt_template_encode, pipe.tokenizer_max_length = "{}\n", 32
    pipe.text_encoder_out_layers = ((0, 1), (1, 2))
    return quiet(pipe)


FAMILY = TinyFamily(
    name="bria_fibo2",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent"},
)
