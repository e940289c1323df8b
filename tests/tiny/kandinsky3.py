"""Kandinsky 3 at 2 resolutions. It guides for scales above 1, at ω = scale + 1."""

import torch
from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet, VQModel

from tiny._parts import lively, quiet
from tiny.family import TinyFamily
from tiny.text import prompts, t5_encoder, t5_tokenizer


def pipeline() -> Kandinsky3Pipeline:
    torch.manual_seed(0)
    unet = Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=12,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 16),
        cross_attention_dim=16,
        encoder_hid_dim=24,
    )
    movq = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        num_vq_embeddings=8,
        norm_num_groups=2,
    )
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    unet = lively(unet).requires_grad_(False)  # torch rounds otherwise where it may need gradients
    return quiet(Kandinsky3Pipeline(t5_tokenizer(), t5_encoder(24), unet, scheduler, movq.eval()))


FAMILY = TinyFamily(
    name="kandinsky3",
    pipeline=pipeline,
    inputs=lambda n: {"prompt": prompts(n)},
    call={"height": 64, "width": 64, "num_inference_steps": 4, "output_type": "latent"},
    omega_offset=1.0,
)
