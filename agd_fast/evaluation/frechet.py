"""Fréchet distance (Heusel et al., arXiv 1706.08500) between two sets of features."""

from __future__ import annotations

from torch import Tensor, nn


class _Features(nn.Identity):
    """Tells torchmetrics that its input already consists of features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """‖μ_r − μ_f‖² + Tr(Σ_r + Σ_f − 2(Σ_r Σ_f)^½), in float64; real [M, D], fake [N, D] of any feature extractor.

    Raises: ValueError when there are not at least two rows of one width in each.
    """
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < 2:
        raise ValueError(f"expected features [M, D] and [N, D] with M, N ≥ 2, found {tuple(real.shape)}, {tuple(fake.shape)}")
    from torchmetrics.image.fid import FrechetInceptionDistance  # pulls in matplotlib and scipy, needed only here

    metric = FrechetInceptionDistance(feature=_Features(real.shape[1]), normalize=True)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())
