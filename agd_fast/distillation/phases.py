"""How long the phases of a run took, and the most that each held on a card."""

from __future__ import annotations

import time

import torch


class Phases:
    """seconds, peak_bytes: by phase; the latter of a CUDA device alone, of all that this process had allocated there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._start()

    def done(self, phase: str) -> None:
        """Of what ran since the phase before."""
        self.seconds[phase] = time.perf_counter() - self._began
        if self.device.type == "cuda":
            self.peak_bytes[phase] = torch.cuda.max_memory_allocated(self.device)
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
