"""Host time of a training pass for each way to keep less, on models as deep as the public ones but narrow."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from agd_fast.attaching import armed, require_attachment
from agd_fast.forward import nest
from agd_fast.memory import MODES, ops
from agd_fast.memory.blocks import checkpointing
from agd_fast.memory.frozen_backward import frozen_backward
from agd_fast.memory.modes import WITHIN_BLOCKS, Mode
from agd_fast.memory.ops import launching
from memory.students import arguments, student
from speed.architectures import ARCHITECTURES, Architecture
from speed.counting import counting

Row = dict[str, Any]
PLAIN, CHECKPOINTING, BLOCKS = "plain", "checkpointing", "blocks"
WAYS = (PLAIN, CHECKPOINTING, *MODES, BLOCKS)
PERCENTILES = {"p20": 0.2, "median": 0.5, "p80": 0.8}
_WIDTH, _HEADS, _PROMPT = 32, 2, (4, 32)
_NARROW: Mapping[str, tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = {  # changes to the config and the conditions
    "sdxl-1024": (
        {
            "sample_size": 8,
            "attention_head_dim": _HEADS,
            "block_out_channels": [_WIDTH] * 3,
            "cross_attention_dim": _PROMPT[1],
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        },
        {"encoder_hidden_states": _PROMPT, "added_cond_kwargs.text_embeds": (32,)},
    ),
    "sd3-medium-1024": (
        {
            "sample_size": 8,
            "num_attention_heads": _HEADS,
            "attention_head_dim": _WIDTH // _HEADS,
            "joint_attention_dim": _PROMPT[1],
            "caption_projection_dim": _WIDTH,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 8,
        },
        {"encoder_hidden_states": _PROMPT, "pooled_projections": (32,)},
    ),
    "dit-xl2-256": ({"sample_size": 8, "num_attention_heads": _HEADS, "attention_head_dim": _WIDTH // _HEADS}, {}),
}
MODELS = tuple(_NARROW)


def narrow(name: str) -> Architecture:
    """The public model at full depth and small width."""
    full = ARCHITECTURES[name]
    config, conditions = _NARROW[name]
    return replace(
        full,
        config={**full.config, **config},
        sample=(full.sample[0], 8, 8),
        conditions={**full.conditions, **conditions},
    )


@contextmanager
def launched() -> Iterator[None]:
    """On a CPU the packing ops do what they do with the extension, except run its kernels: results are left unwritten."""
    library = torch.library.Library(ops.NAMESPACE, "IMPL")
    for name, launch in ops.LAUNCHERS.items():
        library.impl(name, launch, "CPU")
    try:
        with (
            patch.object(launching, "extension_on", lambda index: _Extension()),
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, create=True),
        ):
            yield
    finally:
        library._destroy()


class _Extension:
    """`agd_fast._cuda` without its kernels."""

    def __getattr__(self, name: str) -> Callable[..., int]:
        return lambda *args: 0


class Pass:
    """One way's forward and backward of one sample, inside its scope."""

    def __init__(self, architecture: Architecture, way: str, stack: ExitStack) -> None:
        cpu = torch.device("cpu")
        self.denoiser = student(architecture, "default", cpu, torch.float32)
        self.attachment = require_attachment(self.denoiser)
        self.call = nest(arguments(architecture, 1, cpu, torch.float32))
        if way in (CHECKPOINTING, BLOCKS):
            stack.enter_context(checkpointing(self.denoiser))
        if way not in (PLAIN, CHECKPOINTING):
            stack.enter_context(frozen_backward(self.denoiser, _large(WITHIN_BLOCKS if way == BLOCKS else MODES[way])))

    def forward(self) -> Tensor:
        with armed(self.attachment, torch.tensor([3.0])):
            return self.denoiser(**self.call, return_dict=False)[0].sum()

    def run(self) -> tuple[Tensor, tuple[float, float], tuple[float, float]]:
        """The output; wall and CPU seconds of the forward, and of forward and backward."""
        start = _now()
        output = self.forward()
        middle = _now()
        output.backward()
        end = _now()
        self.attachment.adapter.zero_grad()
        return output.detach(), _since(start, middle), _since(start, end)


def _large(mode: Mode) -> Mode:
    """The mode, which packs narrow tensors as it does those of a wide model."""
    return replace(mode, smallest=1, narrow=0)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - start[0], end[1] - start[1]


def measure(name: str, ways: Sequence[str], rounds: int, kernels: bool, architecture: Architecture | None = None) -> list[Row]:
    """One row per way. kernels: whether the packing ops compute, in PyTorch on the CPU."""
    with ExitStack() as stack:
        if not kernels:
            stack.enter_context(launched())
        passes = {way: Pass(architecture or narrow(name), way, stack) for way in ways}
        rows = {way: {"model": name, "way": way, "packing": "in PyTorch" if kernels else "launched"} for way in ways}
        for way, one in passes.items():
            for _ in range(2):  # the first pass finds out which norms are read
                one.run()
            with counting("cpu") as counts:
                output = one.forward()
            forward = counts.launches.total()
            with counting("cpu") as counts:
                output.backward()
            rows[way] |= {"forward_launches": forward, "pass_launches": forward + counts.launches.total()}
        seconds = _interleaved(passes, rounds)
    return [rows[way] | {"rounds": rounds} | _figures(seconds[way]) for way in ways]


def _interleaved(passes: Mapping[str, Pass], rounds: int) -> dict[str, list[tuple[float, ...]]]:
    """Per round, wall and CPU seconds of the forward, then of the whole pass: every way once in each round, in rotated order."""
    names = [*passes]
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in passes}
    gc.collect()
    gc.freeze()  # what exists before a pass is not part of its collections
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            _, forward, whole = passes[name].run()
            seconds[name].append((*forward, *whole))
    gc.unfreeze()
    return seconds


def _figures(seconds: Sequence[tuple[float, ...]]) -> Row:
    """Milliseconds."""
    found: Row = {}
    columns = ("forward_wall_ms", "forward_cpu_ms", "pass_wall_ms", "pass_cpu_ms")
    for column, values in zip(columns, zip(*seconds, strict=True), strict=True):
        of = torch.tensor(values, dtype=torch.float64) * 1e3
        found[column] = {name: round(float(of.quantile(share)), 3) for name, share in PERCENTILES.items()}
    return found
