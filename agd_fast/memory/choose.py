"""Which way of training fits a card: estimated before the first step; if the estimate was wrong, another one is tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from agd_fast.memory.estimate import BLOCKS, OFF, MemoryRow, estimate_memory
from agd_fast.memory.modes import WITHIN_BLOCKS, Activations, Mode
from agd_fast.memory.weight_codes import Kind

Memory = Literal["exact", "8bit", "4bit", "recompute", "blocks", "auto"]

_GIB = 2**30
LESS = 0.95  # when a way runs out of memory, one that takes at most this fraction of what it took may fit
USABLE = 0.9  # fraction of what is free: the rest is for gaps in the allocator and workspaces of cuBLAS and cuDNN


@dataclass(frozen=True)
class Way:
    """One way to train. activations: as in `frozen_backward`; None for plain autograd. base_weights: as in `packed_base`.
    micro_batch_size: states per forward; None for the whole batch. blocks: whether only the input of each block is kept;
    blocks then run again in backward, one at a time, and each keeps what `activations` says, except for its attention."""

    activations: Activations | None = None
    base_weights: Kind | None = None
    micro_batch_size: int | None = None
    blocks: bool = False

    @property
    def mode(self) -> str:
        """Its mode in `estimate_memory`."""
        return BLOCKS if self.blocks else self.activations or OFF

    @property
    def kept(self) -> str | Mode | None:
        """Its `activations` in `frozen_backward`."""
        return WITHIN_BLOCKS if self.blocks else self.activations

    def __str__(self) -> str:
        parts = ["blocks run again"] if self.blocks else []
        parts += [f"activations {self.activations}"] if self.activations else []
        parts += [f"base in {self.base_weights}"] if self.base_weights else []
        states = self.micro_batch_size
        parts += [f"{states} state{'s' * (states > 1)} a forward"] if states else []
        return ", ".join(parts) or "nothing saved"


def ways_of(
    memory: Memory | None, base_weights: Kind | None, micro_batch_size: int | None, blocks: bool = True
) -> tuple[Way, ...]:
    """The ways `distill` may use, in the order in which they are tried: one way, or those of "auto". blocks: whether the
    denoiser has blocks that can run again.

    Raises: ValueError for an unknown name, and for "blocks" if the denoiser has none.
    """
    for name, value, known in (("memory", memory, get_args(Memory)), ("base_weights", base_weights, get_args(Kind))):
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))} or None; found {value!r}")
    of_blocks = (Way("8bit", base_weights, micro_batch_size, blocks=True),) if blocks else ()
    if memory == "blocks":
        if not of_blocks:
            raise ValueError(
                "memory='blocks' expects a model of diffusers with gradient checkpointing, found none; see 'recompute'"
            )
        return of_blocks
    if memory != "auto":
        return (Way(memory, base_weights, micro_batch_size),)
    modes = tuple(Way(mode, base_weights, micro_batch_size) for mode in get_args(Activations))
    least = (modes[-1], *of_blocks)
    return (*modes[:-1], *least, *(() if base_weights else (replace(way, base_weights="int8") for way in least)))


@dataclass(frozen=True)
class Choice:
    """The chosen way, followed by the one to go on with if it runs out of memory, and why it was chosen."""

    ways: tuple[Way, ...]
    reason: str


def choose(
    ways: Sequence[Way],
    budget: int,
    batch_size: int,
    estimate: Callable[[Way], MemoryRow],
) -> Choice:
    """The first way that fits, followed by the next one that takes clearly less.

    A way takes as many states per forward as fit, up to the batch, unless it sets their number. A number that divides the batch
    is preferred if it takes no more than twice the forwards. If nothing fits, the last way is chosen, with one state per forward.
    budget: bytes for weights, adapters, gradients, optimizer, activations and working memory. batch_size: of one process.
    estimate: gives a way's memory for one state.
    """
    usable = int(budget * USABLE)
    needs: list[str] = []
    for index, way in enumerate(ways):
        row = estimate(way)
        fitting = _evenly(batch_size, _states_that_fit(row, usable))
        states = min(way.micro_batch_size or fitting, batch_size)
        if states and _at(row, states) <= usable:
            less = LESS * _at(row, states)
            after = next((left for left in ways[index + 1 :] if _at(estimate(left), states) <= less), None)
            found = [replace(one, micro_batch_size=one.micro_batch_size or states) for one in (way, after) if one]
            before = f"; {needs[-1]}" if needs else ""
            return Choice(tuple(found), f"{found[0]}: {_gib(_at(row, states))} of {_gib(budget)} GiB{before}")
        needs.append(f"{way} would take {_gib(_at(row, max(states, 1)))}")
    last = replace(ways[-1], micro_batch_size=ways[-1].micro_batch_size or 1)
    return Choice((last,), f"{last}, the last way there is, though {needs[-1]} of {_gib(budget)} GiB")


def _at(row: MemoryRow, states: int) -> int:
    """What a row for one state takes with `states`: activations and working memory grow with their number."""
    return row.total + (states - 1) * (row.activations + row.working)


def _states_that_fit(row: MemoryRow, usable: int) -> int:
    return max(0, 1 + (usable - row.total) // max(1, row.activations + row.working))


def _evenly(batch: int, most: int) -> int:
    """The largest size up to `most` that divides the batch, so that all forwards have one shape; `most` if that size is less
    than half of it."""
    size = next((size for size in range(min(most, batch), 0, -1) if batch % size == 0), 0)
    return size if 2 * size >= min(most, batch) else most


def estimator(model: Any, inputs: Mapping[str, Any], optimizer: str) -> Callable[[Way], MemoryRow]:
    """Estimates of ways, from arguments of the denoiser for one state; made once per mode and kind of base weights."""
    known: dict[tuple[str, str | None], MemoryRow] = {}

    def estimate(way: Way) -> MemoryRow:
        key = (way.mode, way.base_weights)
        if key not in known:
            found = estimate_memory(model, modes=(way.mode,), base_weights=way.base_weights, inputs=inputs, optimizer=optimizer)
            known[key] = found.row(way.mode)
        return known[key]

    return estimate


def budget_on(device: torch.device, resident: int) -> int | None:
    """Bytes of a CUDA device that a run may take: what is free, within the process's own limit if there is one, plus the
    `resident` bytes that it has there already. None if there is no card to fit."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    index = torch.cuda.current_device() if device.index is None else device.index  # the memory fraction is asked for by index
    limit = int(torch.cuda.get_per_process_memory_fraction(index) * total) - allocated
    return min(free + torch.cuda.memory_reserved(device) - allocated, limit) + resident


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
