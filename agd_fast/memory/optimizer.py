"""AdamW with its moments in host memory: it takes few bytes of a card, at the full precision of AdamW.

The moments of a group are stored one after another, whichever parameter they belong to, and cross the bus in chunks. Chunks
alternate between two streams, so that one is transferred while another is updated.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import AdamW

from agd_fast.warning import first_line, warn

MOMENTS = ("exp_avg", "exp_avg_sq")
# Bytes of moments in a chunk; two chunks are on a card at a time. A choice: smaller ones leave more of the card to passes, but
# for each the host launches a step of AdamW and four copies, and has 1.3 ms for that before a bus of 25 GB/s has to wait. Other
# sizes are not measured yet.
CHUNK = 2**25
WORK = 4 * CHUNK  # most bytes of a card that a step takes: two chunks, and as much again for AdamW's intermediate results


class HostAdamW(AdamW):
    """torch.optim.AdamW on one chunk of parameters at a time; a chunk's moments are on the device only for its step.

    On a CPU it is AdamW. The gradients are on the parameters' device, so clipping their norm works as usual, also over several
    micro-batches and processes.
    """

    _rows: list[_Row] | None = None
    _pageable = False  # whether it has warned that moments are not pinned

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rows, state, groups = self._laid_out(), self.state, self.param_groups
        try:
            for row in rows:
                row.begin(state)
                with _joined(row.streams):
                    for chunk, stream in zip(row.chunks, cycle(row.streams), strict=False):
                        if any(parameter.grad is not None for parameter, _, _ in chunk.pieces):
                            with torch.cuda.stream(stream), row.on_device(chunk, state) as states:
                                self.state, self.param_groups = states, [{**groups[row.group], "params": [*states]}]
                                super().step()
                row.count(state)
        finally:
            self.state, self.param_groups = state, groups
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._rows = None
        self._laid_out()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._rows = None

    def _laid_out(self) -> list[_Row]:
        """The rows, which hold all moments that exist."""
        if self._rows is None:
            rows: list[_Row] = []
            for number, group in enumerate(self.param_groups):
                kinds: dict[Any, list[Tensor]] = {}
                for parameter in group["params"]:
                    kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
                rows += [_Row(number, parameters, self.state) for parameters in kinds.values()]
            self._rows = rows
            refused = next((row.refused for row in rows if row.refused), "")
            if refused and not self._pageable:
                self._pageable = True
                warn(f"the optimizer's moments lie in pageable memory, from which they take longer to a card: {refused}")
        return self._rows


class Chunk(NamedTuple):
    """start: its position in a row. pieces: (parameter, start, stop) of the elements in it."""

    start: int
    pieces: list[tuple[Tensor, int, int]]


def cut(parameters: Sequence[Tensor], most: int) -> list[Chunk]:
    """The row of all elements of `parameters`, in chunks of at most `most`."""
    chunks: list[Chunk] = []
    end = 0
    for parameter in parameters:
        done, size = 0, parameter.numel()
        while done < size:
            if end % most == 0:
                chunks.append(Chunk(end, []))
            taken = min(size - done, most - end % most)
            chunks[-1].pieces.append((parameter, done, done + taken))
            done, end = done + taken, end + taken
    return chunks


class _Row:
    """Parameters of one group, device and dtype, and their moments in host memory, pinned if a card reads them and CUDA allows
    it."""

    def __init__(self, group: int, parameters: list[Tensor], state: Any) -> None:
        self.group, self.parameters = group, parameters
        first, sizes = parameters[0], [parameter.numel() for parameter in parameters]
        self.device, self.streams = first.device, _streams(first.device)
        self.overlaps = self.streams[0] is not None
        self.chunks = cut(parameters, CHUNK // len(MOMENTS) // first.element_size() if self.overlaps else sum(sizes))
        self.moments = {name: torch.zeros(sum(sizes), dtype=first.dtype) for name in MOMENTS}
        self.refused = _pin(self) if self.overlaps else ""
        by_name = [moment.split(sizes) for moment in self.moments.values()]
        self.own = [
            {name: one.as_strided(parameter.shape, parameter.stride()) for name, one in zip(MOMENTS, found, strict=True)}
            for parameter, *found in zip(parameters, *by_name, strict=True)
        ]
        for parameter, own in zip(parameters, self.own, strict=True):
            if parameter in state:
                for name, moment in own.items():
                    state[parameter][name] = moment.copy_(state[parameter][name])

    def begin(self, state: Any) -> None:
        """Make the state of parameters that have their first gradient, as AdamW does."""
        for parameter, own in zip(self.parameters, self.own, strict=True):
            if parameter.grad is not None and not state[parameter]:
                step = torch.zeros((), dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
                state[parameter].update(step=step, **{name: moment.zero_() for name, moment in own.items()})

    @contextmanager
    def on_device(self, chunk: Chunk, state: Any) -> Iterator[defaultdict[Tensor, Any]]:
        """The pieces of a chunk that have gradients, with these, and their states: on the device inside, then copied back."""
        sizes = [stop - start for _, start, stop in chunk.pieces]
        host = [moment[chunk.start : chunk.start + sum(sizes)] for moment in self.moments.values()]
        there = [moment.to(self.device, non_blocking=self.overlaps) for moment in host]
        states: defaultdict[Tensor, Any] = defaultdict(dict)
        for (parameter, start, stop), *own in zip(chunk.pieces, *[moment.split(sizes) for moment in there], strict=True):
            if parameter.grad is not None:
                piece = _in_memory_order(parameter.detach(), parameter)[start:stop]
                piece.grad = _in_memory_order(parameter.grad, parameter)[start:stop]
                states[piece] = {"step": state[parameter]["step"].clone(), **dict(zip(MOMENTS, own, strict=True))}
        yield states
        for into, moment in zip(host, there, strict=True):
            into.copy_(moment, non_blocking=self.overlaps)

    def count(self, state: Any) -> None:
        """Count a step for every parameter that has a gradient."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                state[parameter]["step"] += 1


def _in_memory_order(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor's elements, [n], in the order in which those of the dense `parameter` lie in memory."""
    if tensor.stride() != parameter.stride():
        tensor = torch.empty_like(parameter).copy_(tensor)
    return tensor.as_strided((tensor.numel(),), (1,))


def _streams(device: torch.device) -> Sequence[torch.cuda.Stream | None]:
    return [torch.cuda.Stream(device), torch.cuda.Stream(device)] if device.type == "cuda" else [None]


@contextmanager
def _joined(streams: Sequence[torch.cuda.Stream | None]) -> Iterator[None]:
    """Inside, the streams run after all work queued so far; at the end they are done: moments may be read, gradients freed."""
    used = [stream for stream in streams if stream is not None]
    for stream in used:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
    try:
        yield
    finally:
        for stream in used:
            stream.synchronize()


def _pin(row: _Row) -> str:
    """Pin the row's moments in place: memory that torch itself pins is rounded up to a power of two of bytes. Returns what CUDA
    says if it refuses; the host then waits for the copies, with the same result."""
    runtime = torch.cuda.cudart()
    for moment in filter(Tensor.numel, row.moments.values()):
        try:
            torch.cuda.check_error(int(runtime.cudaHostRegister(moment.data_ptr(), moment.nbytes, 1)))
        except torch.cuda.CudaError as error:
            with suppress(RuntimeError):  # clear CUDA's last error, which the next launch would raise
                torch.zeros(1, device=row.device)
            return first_line(error)
        weakref.finalize(row, runtime.cudaHostUnregister, moment.data_ptr())
    return ""
