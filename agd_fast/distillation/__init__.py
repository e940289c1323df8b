"""Training an adapter to predict in one pass what guidance predicts in two."""

from agd_fast.distillation.config import TrainConfig
from agd_fast.distillation.distill import DistillResult, distill

__all__ = ["DistillResult", "TrainConfig", "distill"]
