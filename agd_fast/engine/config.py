"""What a user may choose about the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EngineConfig:
    """How an optimized denoiser runs.

    compile: torch.compile(fullgraph=True) of what is left of a step; None does it on CUDA. mode: of torch.compile.
    graph: one CUDA graph a step; None does it on CUDA.
    max_table_bytes: of the table that holds what depends on the step alone; where all steps of a schedule need more, it is
        computed in each step instead.
    """

    compile: bool | None = None
    mode: str | None = None
    graph: bool | None = None
    max_table_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.max_table_bytes < 0:
            raise ValueError(f"max_table_bytes must not be negative, found {self.max_table_bytes}")

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile

    def graphs(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.graph is not False
