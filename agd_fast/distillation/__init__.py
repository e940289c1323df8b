"""Training an adapter to predict in one pass what guidance predicts in two."""

from agd_fast.distillation.config import TrainConfig
from agd_fast.distillation.distill import distill
from agd_fast.distillation.job import DistillResult

__all__ = ["DistillResult", "TrainConfig", "distill"]
