"""The ideas that keep less for backward, switched on one after another."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import nn

from agd_fast.memory import MODES, Mode, frozen_backward
from agd_fast.memory.base_weights import packed_base
from agd_fast.memory.handlers import HANDLERS
from agd_fast.memory.weight_codes import Kind

_FORWARD = importlib.import_module("agd_fast.memory.frozen_backward")
_NORMS = ("layer_norm", "rms_norm", "group_norm", "cast", "addcmul", "follow", "linear", "bmm")
_OF = {"attention": ("attention",), "convolutions": ("conv",), "norms": _NORMS}
_8BIT = MODES["8bit"]


@dataclass(frozen=True)
class Way:
    """One way to run a training pass. kept: what is kept for backward; None leaves it to autograd. handlers: files of the only
    handlers that act; None for all. autocast: to bfloat16. base: how the base's weights are stored."""

    kept: Mode | None = None
    handlers: tuple[str, ...] | None = None
    autocast: bool = False
    base: Kind | None = None

    @contextmanager
    def scope(self, denoiser: nn.Module, smallest: int | None = None) -> Iterator[None]:
        """smallest: the least number of elements of a packed tensor, instead of the mode's."""
        with ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext())
            if self.base is not None:
                stack.enter_context(packed_base(denoiser, self.base))
            if self.handlers is not None:
                stack.enter_context(patch.object(_FORWARD, "HANDLERS", _only(self.handlers)))
            if self.kept is not None:
                mode = self.kept if smallest is None else replace(self.kept, smallest=smallest)
                stack.enter_context(frozen_backward(denoiser, mode))
            yield


def _only(files: tuple[str, ...]) -> dict[object, object]:
    return {function: handler for function, handler in HANDLERS.items() if handler.__module__.rpartition(".")[2] in files}


def _files(*names: str) -> tuple[str, ...]:
    return tuple(file for name in names for file in _OF[name])


IDEAS = {
    "eager": Way(),
    "attention keeps q, k, v and runs again": Way(MODES["exact"], _files("attention")),
    "+ convolutions keep nothing": Way(MODES["exact"], _files("attention", "convolutions")),
    "+ norms keep their input, and it gives the output": Way(MODES["exact"], _files("attention", "convolutions", "norms")),
    "+ activations and their products in one (exact)": Way(MODES["exact"]),
    "+ all of it in 8 bits (8bit)": Way(_8BIT),
    "+ factors of feed-forwards in 4 bits": Way(replace(_8BIT, factor=4)),
    "+ x̂ that nothing else reads in 4 bits (4bit)": Way(MODES["4bit"]),
    "+ q, k, v and feed-forwards made again (recompute)": Way(MODES["recompute"]),
}
NOT_TAKEN = {  # each instead of what "4bit" does
    "4bit, attention in 4 bits too": Way(replace(MODES["4bit"], attention=4)),
    "4bit, x̂ in 4 bits everywhere": Way(replace(MODES["4bit"], fine=4)),
}
BESIDE = {
    "bf16 autocast": Way(autocast=True),
    "bf16 autocast, 4bit": Way(MODES["4bit"], autocast=True),
    "base in int8, 4bit": Way(MODES["4bit"], base="int8"),
    "base in nf4, 4bit": Way(MODES["4bit"], base="nf4"),
}
