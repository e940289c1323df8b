"""AudioLDM 2 with its two text encoders and the language model; its result has `audios`, not `images`."""

import torch
from diffusers import AudioLDM2Pipeline, AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel
from transformers import ClapFeatureExtractor, GPT2Config, GPT2LMHeadModel

from tiny._parts import lively, quiet, tiny_vae
from tiny._sound import clap, roberta_tokenizer, vocoder
from tiny.family import TinyFamily
from tiny.sd15 import scheduler
from tiny.text import prompts, t5_encoder, t5_tokenizer


def gpt2(width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": width, "n_head": 2, "n_layer": 2, "vocab_size": 8, "n_positions": 64}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=1)
    config.max_new_tokens = 3
    return lively(GPT2LMHeadModel(config))


def unet() -> AudioLDM2UNet2DConditionModel:
    torch.manual_seed(0)
    return lively(
        AudioLDM2UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=([None, 12, 20],) * 2,
            attention_head_dim=2,
        )
    )


def pipeline() -> AudioLDM2Pipeline:
    return quiet(
        AudioLDM2Pipeline(
            vae=tiny_vae(pixels=1),
            text_encoder=clap(8),
            text_encoder_2=t5_encoder(20),
            projection_model=lively(AudioLDM2ProjectionModel(8, 20, 12), seed=1),
            language_model=gpt2(12),
            tokenizer=roberta_tokenizer(),
            tokenizer_2=t5_tokenizer(),
            feature_extractor=ClapFeatureExtractor(feature_size=4),
            unet=unet(),
            scheduler=scheduler(),
            vocoder=vocoder(),
        )
    )


FAMILY = TinyFamily(
    name="audioldm2",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"audio_length_in_s": 2.0, "num_inference_steps": 4, "output_type": "latent"},
)
