"""HiDream with a block of two streams and one of one, each with a layer of the language model."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HiDreamImagePipeline, HiDreamImageTransformer2DModel

from tiny._language import llama
from tiny._parts import lively, quiet, tiny_vae
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, clip_text, clip_tokenizer, prompts, t5_encoder, t5_tokenizer


def pipeline() -> HiDreamImagePipeline:
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=16,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip_text(8, projection=8),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(8, projection=8, seed=1),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(16),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(16),
        tokenizer_4=byte_tokenizer(16),
        transformer=lively(transformer),
    )
    pipe.default_sample_size = 8  # images are made of that area, whatever is asked for
    return quiet(pipe)


FAMILY = TinyFamily(
    name="hidream",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "max_sequence_length": 16},
    sign=-1,
)
