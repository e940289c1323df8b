"""One CUDA graph of a whole step: the host starts one thing, whatever the number of kernels in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WARMUP = 3  # runs before the recording: compilation, autotuning and workspaces must be done with

Step = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@functools.cache
def _pool() -> Any:
    """The memory that all graphs work in: they never run at the same time, and what they give is copied out at once."""
    return torch.cuda.graph_pool_handle()


class GraphedStep:
    """`step(moving, kept)` recorded once and replayed on memory of its own, to which the tensors of each call are copied: those
    of `kept` only when they are others than the last time."""

    def __init__(self, step: Step, moving: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        self.moving, self.kept = [tensor.clone() for tensor in moving], [tensor.clone() for tensor in kept]
        self.loaded = list(kept)
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                step(self.moving, self.kept)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_pool()):
            self.outputs = step(self.moving, self.kept)

    def fits(self, kept: Sequence[Tensor]) -> bool:
        """Not where a schedule has another number of steps."""
        return [tensor.shape for tensor in kept] == [tensor.shape for tensor in self.kept]

    def __call__(self, moving: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor]:
        for index, tensor in enumerate(kept):
            if tensor is not self.loaded[index]:
                self.kept[index].copy_(tensor)
        self.loaded = list(kept)
        for place, tensor in zip(self.moving, moving, strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]  # schedulers keep what they are given
