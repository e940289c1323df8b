"""What tiny pipelines share beside their text encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def lively(module: Module, seed: int = 0, gains: Mapping[str, float] | None = None) -> Module:
    """New random weights that keep the size of what passes through them, also where training would start from zero.

    gains: factors of the weights whose names match a glob, to let the prompt weigh more.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and parameter.shape[0] > 1:
                fan_in = parameter.numel() // parameter.shape[0]
                gain = math.prod(factor for path, factor in (gains or {}).items() if fnmatchcase(name, path))
                parameter.normal_(std=gain * fan_in**-0.5, generator=random)
    return module.eval()


def tiny_vae(channels: int = 4, seed: int = 0, pixels: int = 3) -> AutoencoderKL:
    """Latents [B, channels, H/2, W/2]. pixels: channels of what is decoded."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=pixels,
        out_channels=pixels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=16,
    ).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
