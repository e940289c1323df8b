"""How long the phases of a run took, and the peak memory of each on a card."""

from __future__ import annotations

import time

import torch


class Phases:
    """seconds, peak_bytes: by phase; the latter only on a CUDA device, of all that this process had allocated there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._start()

    def done(self, phase: str) -> None:
        """End a phase: all that ran since the previous one."""
        self.seconds[phase] = time.perf_counter() - self._began
        if self.device.type == "cuda":
            self.peak_bytes[phase] = torch.cuda.max_memory_allocated(self.device)
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
