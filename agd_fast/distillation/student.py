"""The denoiser with its adapter as one module, so that whatever wraps a module (DDP, autocast) wraps both."""

from __future__ import annotations

from torch import Tensor, nn

from agd_fast.attaching import require_attachment
from agd_fast.teacher import Teacher
from agd_fast.trajectories import Batch


class Student(nn.Module):
    """forward: a batch of states → ε̂_agd [B, C, ...] in one pass. Only the adapter's parameters are trained."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.denoiser, self.adapter = teacher.denoiser, require_attachment(teacher).adapter
        self._teacher = teacher

    def forward(self, batch: Batch) -> Tensor:
        return self._teacher.predict_agd(batch.sample.to(self._teacher.dtype), batch.timestep, batch.conditions, batch.omega)
