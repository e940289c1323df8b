"""AudioLDM, whose result is always decoded, and MusicLDM, given embeddings: it does not run with the CLAP of transformers 5."""

import torch
from diffusers import AudioLDMPipeline, MusicLDMPipeline, UNet2DConditionModel

from tiny import sd15
from tiny._parts import quiet, tiny_vae
from tiny._sound import clap, clap_text, roberta_tokenizer, vocoder
from tiny.family import TinyFamily
from tiny.text import prompts

WIDTH = 12  # of the text's embedding


def unet() -> UNet2DConditionModel:
    return sd15.unet(
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
        projection_class_embeddings_input_dim=WIDTH,
        cross_attention_dim=(8, 16),
    )


def pipeline() -> AudioLDMPipeline:
    parts = (tiny_vae(pixels=1), clap_text(WIDTH), roberta_tokenizer(), unet(), sd15.scheduler(), vocoder())
    return quiet(AudioLDMPipeline(*parts))


def music_pipeline() -> MusicLDMPipeline:
    parts = (tiny_vae(pixels=1), clap(WIDTH), roberta_tokenizer(), None, unet(), sd15.scheduler(), vocoder())
    return quiet(MusicLDMPipeline(*parts))


def embeddings(count: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    found = {name: torch.randn(count, WIDTH, generator=random) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return {name: torch.nn.functional.normalize(value, dim=-1) for name, value in found.items()}


CALL = {"audio_length_in_s": 2.0, "num_inference_steps": 4}

FAMILY = TinyFamily("audioldm", pipeline, lambda n: {"prompt": prompts(n)}, {**CALL, "output_type": "pt"})

SIBLINGS = {"musicldm": TinyFamily("musicldm", music_pipeline, embeddings, {**CALL, "output_type": "latent"})}
