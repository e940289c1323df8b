"""The distillation loss: ‖ε̂_agd(x_t, t, c, ω) − ε_cfg‖ in the model's own output space."""

from __future__ import annotations

from torch import Tensor

from agd_fast.distillation.config import Loss, Weighting


def distillation_loss(prediction: Tensor, target: Tensor, omega: Tensor, loss: Loss, weighting: Weighting) -> Tensor:
    """Mean over samples of each one's weighted mean error; prediction, target [B, C, ...], omega [B] → scalar float32.

    Raises: ValueError when prediction and target differ in shape.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"expected a prediction of the target's shape {tuple(target.shape)}, found {tuple(prediction.shape)}")
    error = prediction.float() - target.float()
    each = (error.square() if loss == "l2" else error.abs()).flatten(1).mean(dim=1)  # [B]
    if weighting == "omega":
        each = each / ((omega - 1).square() + 0.25)
    return each.mean()
