"""An evaluation of a tiny pipeline, and its scores read off the pictures in another way."""

import math

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

import agd_fast as agd
from helpers_families import attach_trained
from tiny import FAMILIES
from tiny.text import clip_text, clip_tokenizer

SIZE = {"height": 16, "width": 16}


def evaluate(pipe, folder, family=FAMILIES["sd15"], count=3, **changes):
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    settings = {"call": call, "guidance_scales": (2.0, 4.0), "steps": 2, "explained_prompts": 0, "timing_rounds": 0}
    if "prompts" not in changes and "inputs" not in changes:
        settings["inputs"] = family.inputs(count)
    return agd.evaluate_pipeline(pipe, output_dir=folder, **{**settings, "progress": False, **changes})


def with_adapter(name="sd15", **config):
    pipe = FAMILIES[name].pipeline()
    attach_trained(pipe, **config)
    return pipe


def lightness(a, b):
    """In the place of LPIPS."""
    return (a.mean(dim=(1, 2, 3)) - b.mean(dim=(1, 2, 3))).abs()


def colours(pictures):
    """In the place of Inception: [N, 3]"""
    return pictures.mean(dim=(2, 3))


def read(folder, way, numbers):
    """float64 [N, H, W, 3] in [0, 1]"""
    return np.stack([np.array(Image.open(folder / "pictures" / way / f"{n:05d}.png").convert("RGB")) for n in numbers]) / 255


def mean_psnr(a, b):
    return np.mean([10 * math.log10(1 / np.mean((x - y) ** 2)) for x, y in zip(a, b, strict=True)])


def mean_ssim(a, b):
    """Wang et al. 2004: Gaussian windows of 11 pixels, σ = 1.5, around every pixel, mirrored at the edges."""
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line)[:, :, None] / line.sum() ** 2
    values = []
    margins = ((0, 0), (5, 5), (5, 5), (0, 0))
    for x, y in zip(np.pad(a, margins, "reflect"), np.pad(b, margins, "reflect"), strict=True):
        for top in range(x.shape[0] - 10):
            for left in range(x.shape[1] - 10):
                here = np.s_[top : top + 11, left : left + 11]
                mx, my = (np.sum(window * z[here], axis=(0, 1)) for z in (x, y))
                xx, yy, xy = (np.sum(window * p[here] * q[here], axis=(0, 1)) for p, q in ((x, x), (y, y), (x, y)))
                c1, c2 = 0.01**2, 0.03**2
                above = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
                values.append(above / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)))
    return np.mean(values)


def save_clip(folder):
    """A CLIP with random weights, as published ones lie on disk."""
    torch.manual_seed(0)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=clip_text(16).config.to_dict(), vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=8
    )
    size = {"size": {"shortest_edge": 16}, "crop_size": SIZE}
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(**size), clip_tokenizer(77)).save_pretrained(folder)
    return str(folder)
