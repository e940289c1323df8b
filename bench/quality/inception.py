"""Inception features, for those who have the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from agd_fast.evaluation import Reference

SOURCE = "https://github.com/toshas/torch-fidelity/releases (pt_inception-2015-12-05-6726825d.pth)"


def load_inception(weights: Path, images: Tensor, device: torch.device | str = "cpu") -> Reference:
    """`images` (real ones [N, C, H, W] in [−1, 1]) and the 2048 features that FID is measured in; one channel is repeated thrice.

    Raises: FileNotFoundError without the weights; ModuleNotFoundError (from torchmetrics) without the package torch-fidelity.
    """
    if not weights.is_file():
        raise FileNotFoundError(f"expected the weights of Inception, found no file {weights}; they are at {SOURCE}")
    model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)

    def features(x: Tensor) -> Tensor:
        pixels = x.clamp(-1, 1).add(1).mul(127.5).round().byte()
        return model(pixels.expand(-1, 3, -1, -1))  # [N, 2048]

    return Reference(images.to(device), features)
