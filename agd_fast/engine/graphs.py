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
def _pool(device: torch.device) -> Any:
    """The memory that all graphs of a device work in: they never run at the same time, and what they give is copied out at once.
    It is kept for good: of a pool whose last graph is gone, nothing can be recorded again."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


class GraphedStep:
    """`step(moving, kept)` recorded once and replayed on memory of its own, to which the tensors of each call are copied: those
    of `kept` only when their `serial` is another than the last time."""

    def __init__(self, step: Step, moving: Sequence[Tensor], kept: Sequence[Tensor], serial: int = 0) -> None:
        self.device = moving[0].device
        self.moving, self.kept, self.loaded = [tensor.clone() for tensor in moving], [tensor.clone() for tensor in kept], serial
        with torch.cuda.device(self.device):  # streams and graphs are those of the current one
            self._record(step)

    def _record(self, step: Step) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                step(self.moving, self.kept)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_pool(self.device).id):
            self.outputs = step(self.moving, self.kept)

    def fits(self, kept: Sequence[Tensor]) -> bool:
        """Not where a schedule has another number of steps."""
        return [tensor.shape for tensor in kept] == [tensor.shape for tensor in self.kept]

    def __call__(self, moving: Sequence[Tensor], kept: Sequence[Tensor], serial: int = 0) -> list[Tensor]:
        if serial != self.loaded:
            for place, tensor in zip(self.kept, kept, strict=True):
                place.copy_(tensor)
            self.loaded = serial
        for place, tensor in zip(self.moving, moving, strict=True):
            place.copy_(tensor)
        with torch.cuda.device(self.device):
            self.graph.replay()
        return [tensor.clone() for tensor in self.outputs]  # schedulers keep what they are given
