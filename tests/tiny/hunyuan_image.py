"""HunyuanImage 2.1 with a block of two streams and one of one. Its call has no guidance scale: `guided` and `off` are to be set
on `pipe.guider`, which serves prompts without quotes."""

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from tiny._language import qwen25_vl
from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import byte_tokenizer, prompts


def pipeline() -> HunyuanImagePipeline:
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=20,
        rope_axes_dim=(8, 4),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=1.0,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    glyphs = T5EncoderModel(T5Config(vocab_size=384, d_model=20, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae.eval(),
        text_encoder=qwen25_vl(16, layers=3),
        tokenizer=byte_tokenizer(16),
        text_encoder_2=glyphs.eval(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=lively(transformer, gains={"*.add_v_proj.weight": 4.0}),
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
        ocr_guider=ClassifierFreeGuidance(guidance_scale=2.0),
    )
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "{}\n", 1
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 4
    return quiet(pipe)


FAMILY = TinyFamily(
    name="hunyuan_image",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 12, "width": 12, "num_inference_steps": 4, "output_type": "latent"},
)
