"""One pass as one CUDA graph: the memory it is recorded in, and what is done after a recording that failed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

Pass = Callable[[Any], Tensor]  # adds to the gradients of parameters and returns the loss, a scalar without history

# torch's allocator of pinned memory keeps asking a graph whose recording was invalidated which streams it records, and no call
# ends that; so such graphs are kept alive, empty.
_ABANDONED: list[torch.cuda.CUDAGraph] = []


class GraphMemory:
    """The memory that the graphs of one training share: they run one after another, and nothing in it outlives a replay."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a recording that failed. If it was invalidated, torch ends it without telling its allocator, which would
        give no memory back from then on."""
        _ABANDONED.append(graph)
        with suppress(RuntimeError):
            graph.reset()  # the state of the random generators that it recorded with
        with suppress(RuntimeError, AttributeError):  # the allocator was told; or this torch lacks these: what it keeps is lost
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with suppress(RuntimeError):  # CUDA reports its error here rather than in somebody else's call
            torch.cuda.synchronize(self.device)


class PassGraph:
    """A pass recorded once, on tensors of its own and on the gradients that the parameters then have; a replay adds to those."""

    def __init__(self, function: Pass, tensors: Sequence[Tensor], loss: Tensor, memory: GraphMemory) -> None:
        self.tensors = [torch.zeros_like(tensor, device=loss.device) for tensor in tensors]
        self.loss = torch.zeros_like(loss)
        self._record(lambda: self.loss.copy_(function(self.tensors)), memory)

    def _record(self, run: Callable[[], Any], memory: GraphMemory) -> None:
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # leftovers of other passes would keep nodes of autograd that belong to another stream
        with torch.cuda.device(memory.device), torch.cuda.stream(torch.cuda.current_stream()):  # current again after a failure
            try:
                with torch.cuda.graph(self.graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                memory.abandon(self.graph)
                raise
            torch._C._cuda_clearCublasWorkspaces()  # which lie in the pool

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        for place, tensor in zip(self.tensors, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
