"""The denoiser with its adapter as one module, so that whatever wraps a module (DDP, autocast) wraps both."""

from __future__ import annotations

from torch import Tensor, nn

from agd_fast.attaching import armed, require_attachment
from agd_fast.teacher import Teacher
from agd_fast.trajectories import Batch


class Student(nn.Module):
    """forward: a batch of states → ε̂_agd [B, C, ...] in one pass. Only the adapter's parameters are trained."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        attachment = require_attachment(teacher)
        self.denoiser, self.adapter = teacher.denoiser, attachment.adapter
        self._teacher, self._attachment = teacher, attachment

    def forward(self, batch: Batch) -> Tensor:
        with armed(self._attachment, batch.omega):
            return self._teacher.predict(batch.sample.to(self._teacher.dtype), batch.timestep, batch.conditions)
