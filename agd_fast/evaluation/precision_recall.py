"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991)."""

from __future__ import annotations

import torch
from torch import Tensor


def precision_recall(real: Tensor, fake: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Shares of fake samples on the real manifold and of real samples on the fake one.

    real [M, D], fake [N, D]: features; a manifold is the union of balls that reach each sample's k-th neighbour.
    """
    real, fake = real.double(), fake.double()
    return _share_inside(fake, real, neighbours), _share_inside(real, fake, neighbours)


def _share_inside(samples: Tensor, manifold: Tensor, neighbours: int) -> float:
    if len(manifold) <= neighbours:
        raise ValueError(f"expected more than {neighbours} samples for {neighbours} neighbours, found {len(manifold)}")
    radii = torch.cdist(manifold, manifold).kthvalue(neighbours + 1, dim=1).values  # the nearest is the sample itself
    inside = torch.cdist(samples, manifold) <= radii
    return inside.any(dim=1).double().mean().item()
