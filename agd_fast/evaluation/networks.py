"""Metrics by pretrained networks, loaded only if asked for: LPIPS, CLIP score, Inception's features.

Pictures are [N, 3, H, W] in [0, 1] throughout this module. None of these networks ships with the package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Lpips = Callable[[Tensor, Tensor], Tensor]  # pictures, pictures → distance [N]
Clip = Callable[[Tensor, list[str]], Tensor]  # pictures, their prompts → score [N]
Features = Callable[[Tensor], Tensor]  # pictures → features [N, D]
Asked = Sequence[str] | Mapping[str, str | Callable[..., Tensor]]

DEFAULTS = {"lpips": "alex", "clip": "openai/clip-vit-large-patch14", "fid": "inception"}
INCEPTION = "https://github.com/toshas/torch-fidelity/releases, weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Networks:
    """The networks that were asked for; None for others. names: by metric, which network it is, for the report."""

    lpips: Lpips | None = None
    clip: Clip | None = None
    features: Features | None = None
    names: dict[str, str] = field(default_factory=dict)


def load_networks(asked: Asked) -> Networks:
    """Load the networks of the metrics, on the CPU; they move to where the pictures are.

    asked: names out of "lpips", "clip" and "fid"; or a mapping from these to which network: "alex", "vgg" or "squeeze" for lpips;
        the folder or Hub id of a CLIP; "inception", or the file with its weights; or any function in its place (`Lpips`, `Clip`,
        `Features` above).

    Raises: ValueError for another name; ImportError naming a missing package; OSError naming weights that cannot be obtained.
    """
    which = dict(asked) if isinstance(asked, Mapping) else {name: DEFAULTS.get(name, "") for name in asked}
    require_known(which)
    loaders = {"lpips": _lpips, "clip": _clip, "fid": _inception}
    found: dict[str, Any] = {name: one if callable(one) else loaders[name](one) for name, one in which.items()}
    names = {name: _name(one) if callable(one) else one for name, one in which.items()}
    return Networks(found.get("lpips"), found.get("clip"), found.get("fid"), names)


def require_known(metrics: Iterable[str]) -> None:
    """Raises: ValueError for a name that is not a metric."""
    if unknown := sorted(set(metrics) - DEFAULTS.keys()):
        raise ValueError(f"expected metrics of {', '.join(DEFAULTS)}; found {', '.join(unknown)}")


def _lpips(net: str) -> Lpips:
    _require("lpips", "torchvision")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    expected = f"lpips expects torchvision's weights of {net}"
    metric = _made(expected, LearnedPerceptualImagePatchSimilarity, net, reduction="none", normalize=True)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        found = metric.to(a.device)(a, b)
        metric.reset()
        return found.flatten()

    return distance


def _clip(name: str) -> Clip:
    """100 · cos of a CLIP's two embeddings, at least 0 (Hessel et al., arXiv 2104.08718, in the scale of torchmetrics)."""
    _require("clip", "transformers")
    from transformers import CLIPModel, CLIPProcessor

    expected = f"clip expects a CLIP of transformers, by its folder or Hub id; found {name!r}"
    model = _made(expected, CLIPModel.from_pretrained, name).eval()
    processor = _made(expected, CLIPProcessor.from_pretrained, name)

    def score(pictures: Tensor, prompts: list[str]) -> Tensor:
        pixels = list(pictures.mul(255).round().byte().cpu())
        length = model.config.text_config.max_position_embeddings
        given = processor(text=prompts, images=pixels, padding=True, truncation=True, max_length=length, return_tensors="pt")
        output = model.to(pictures.device)(**given.to(pictures.device))
        return torch.cosine_similarity(output.image_embeds, output.text_embeds).mul(100).clamp(min=0)

    return score


def _inception(weights: str) -> Features:
    """The 2048 features that FID is measured in. weights: "inception" downloads them; else the file to read them from."""
    _require("fid", "torch_fidelity", "torch-fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    file = None if weights == DEFAULTS["fid"] else weights
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(
            f"fid expects 'inception', or a file with its weights; found no file {file}. They are at {INCEPTION}"
        )
    expected = f"fid expects Inception's weights (a file of {INCEPTION}; metrics={{'fid': FILE}} reads it)"
    model = _made(expected, NoTrainInceptionV3, "inception-v3-compat", ["2048"], file)
    return lambda pictures: model.to(pictures.device)(pictures.mul(255).round().byte())


def _require(metric: str, module: str, package: str | None = None) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{metric} expects the package {package or module} (pip install 'agd-fast[evaluate]'), which gave: {error}"
        ) from error


def _made(expected: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    try:
        return make(*args, **options)
    except OSError as error:  # urllib's and huggingface_hub's as well
        raise OSError(f"{expected}, which could not be had: {error}") from error


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
