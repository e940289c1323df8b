"""Bria FIBO with a block of two streams and one of one, each with a layer of the language model."""

import torch
from diffusers import AutoencoderKLWan, BriaFiboPipeline, BriaFiboTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import SmolLM3Config, SmolLM3ForCausalLM

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts

EMPTY = 128000  # the pipeline's token of an empty prompt


def smollm3(width: int) -> SmolLM3ForCausalLM:
    torch.manual_seed(0)
    config = SmolLM3Config(
        vocab_size=EMPTY + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return SmolLM3ForCausalLM(config).eval()


def pipeline() -> BriaFiboPipeline:
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        text_encoder_dim=12,
        axes_dims_rope=[4, 2, 2],
    )
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(BriaFiboPipeline(lively(transformer), scheduler, vae.eval(), smollm3(12), byte_tokenizer(16)))


FAMILY = TinyFamily(
    name="bria_fibo",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 48, "width": 48, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
)
