"""A whole step as one CUDA graph: the host makes one launch, however many kernels are in it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from agd_fast.warning import first_line

WARMUP = 3  # runs before a step is recorded: compilation, autotuning and allocating workspaces must be finished by then

Step = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


@functools.cache
def _pool(device: torch.device) -> Any:
    """The memory pool that all graphs of a device share: they never run at the same time, and their results are copied out at
    once. It is kept for good, because nothing can be recorded again in a pool whose last graph is gone."""
    with torch.cuda.device(device):
        return torch.cuda.MemPool()


class GraphedStep:
    """`step(moving, kept)`, recorded once and replayed on memory of its own, to which the tensors of each call are copied: those
    of `kept` only when `serial` is not that of the last call. device: where it runs."""

    def __init__(
        self,
        step: Step,
        device: torch.device,
        moving: Sequence[Tensor],
        kept: Sequence[Tensor],
        serial: int = 0,
        warmup: int = WARMUP,
    ) -> None:
        self.device = device
        self.moving, self.kept, self.loaded = [tensor.clone() for tensor in moving], [tensor.clone() for tensor in kept], serial
        with torch.cuda.device(self.device):  # streams and graphs belong to the current device
            self._record(step, warmup)

    def _record(self, step: Step, warmup: int) -> None:
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(warmup):
                step(self.moving, self.kept)
        current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=_pool(self.device).id):
            self.outputs = step(self.moving, self.kept)

    def fits(self, kept: Sequence[Tensor]) -> bool:
        """Whether `kept` has the recorded shapes; not where a schedule has another number of steps."""
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


class Recorded:
    """A function of tensors that runs once a scope: as it is the first time at given shapes, later as one CUDA graph.
    There is no graph if tensors are on other devices: it would freeze the value of a number on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.key: Any = None
        self.graph: GraphedStep | None = None
        self.trouble = ""  # why there is no graph

    def __call__(self, function: Callable[[Sequence[Tensor]], list[Tensor]], tensors: Sequence[Tensor], key: Any) -> list[Tensor]:
        """key: all that the function depends on besides the tensors."""
        key = (key, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if key != self.key:
            self.key, self.graph, self.trouble = key, None, ""
            if any(tensor.device != self.device for tensor in tensors):
                self.trouble = "what is computed ahead is launched one by one: it is of tensors of other devices"
            return function(tensors)
        if self.graph is None and not self.trouble:
            try:
                self.graph = GraphedStep(lambda moving, _: function(moving), self.device, tensors, [], warmup=1)
            except RuntimeError as error:
                self.trouble = f"what is computed ahead is launched one by one: no CUDA graph of it ({first_line(error)})"
        return function(tensors) if self.graph is None else self.graph(tensors, [])
