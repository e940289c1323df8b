"""Rows of the benchmark, one per model, batch, adapter and way to keep less: what is kept for backward, and total use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import nn

from agd_fast.adapters import count_parameters
from agd_fast.attaching import armed, require_attachment
from agd_fast.families import find_spec
from agd_fast.forward import nest
from agd_fast.memory.counting import run_backward
from agd_fast.memory.estimate import estimate_memory, keeping
from agd_fast.reporting.tables import rich_table
from memory.budget import MODELS, MODES, budget
from memory.students import arguments, student
from speed.architectures import Architecture, find_architecture
from speed.counting import counting

Row = dict[str, Any]

EAGER, CHECKPOINTING, MINCUT = "eager", "checkpointing", "mincut"
WAYS = {
    EAGER: "plain autograd",
    CHECKPOINTING: "diffusers' enable_gradient_checkpointing, block by block",
    MINCUT: "what torch.compile keeps: its min-cut partitioner; on a card, torch.compile itself",
    "exact": "ours, nothing is rounded",
    "8bit": "ours",
    "4bit": "ours",
    "recompute": "ours",
    "blocks": "ours: checkpointing, and 8 bits while a block runs again",
}
KEY = (  # what identifies a row
    *("model", "batch", "adapter", "mode", "dtype", "base", "optimizer", "device", "cap_bytes", "search"),
    "whole",  # a distillation from end to end, not training steps alone
    "graphed",  # training steps whose passes are CUDA graphs, as `distill` runs them
)
FIGURES = (
    "parameters",  # trained
    "saved_bytes",
    "budget_bytes",  # the same, on paper
    "by_op",
    "peak_bytes",  # of all allocations; with graphs, also while they are made, with the room asked for the optimizer's step
    "reserved_bytes",
    "phases",  # of a whole distillation: each one's peak allocation, and whether weights were streamed while states were made
    "flops",  # of a forward and backward
    "seconds_per_step",  # a forward and backward of one batch, and its share of the optimizer's step
    "update_seconds",  # of the optimizer's step alone
    "device_seconds",  # of kernels in a forward and backward, without pauses between them
    "images_per_second",
    "loss",
    "note",
)
GIB = 2**30


def count_row(row: Row, architecture: Architecture | None = None) -> Row:
    """`row` with what is counted on the meta device; nothing is computed."""
    name, mode, dtype = row["model"], row["mode"], getattr(torch, row["dtype"])
    architecture, meta = architecture or find_architecture(name), torch.device("meta")
    denoiser = student(architecture, row["adapter"], meta, dtype)
    call = arguments(architecture, row["batch"], meta, dtype)
    found = {**empty_row(row), "parameters": count_parameters(require_attachment(denoiser).adapter)}
    if mode == MINCUT:
        from memory.mincut import count_mincut  # imports inductor

        by_op = count_mincut(denoiser, find_spec(denoiser), call)
        return {**found, "by_op": by_op, "saved_bytes": sum(by_op.values())}
    own = "off" if mode == EAGER else mode
    one = estimate_memory(denoiser, inputs=call, modes=[own], base_weights=row["base"], optimizer=row["optimizer"]).rows[0]
    if name in MODELS and mode in MODES and row["adapter"] == "default" and row["batch"] == 1 and dtype.itemsize == 2:
        found["budget_bytes"] = budget(name, mode)
    found |= {"by_op": dict(one.by_op), "saved_bytes": one.activations, "peak_bytes": one.total}
    return {**found, "flops": count_flops(denoiser, call, own)}


def count_flops(denoiser: nn.Module, call: Mapping[str, Any], mode: str) -> int:
    """FLOPs of products, convolutions and attention in a forward and its backward; mode: as for `estimate_memory`."""
    attachment = require_attachment(denoiser)
    omega = torch.full((len(call[attachment.spec.sample]),), 3.0, device="meta")
    with keeping(denoiser, mode), armed(attachment, omega), counting() as counts:
        run_backward(denoiser(**nest(call), return_dict=False)[0])
    for parameter in attachment.adapter.parameters():
        parameter.grad = None
    return counts.flops


def empty_row(row: Row) -> Row:
    """The row's key entries, all figures None."""
    return {**{name: row.get(name, False) for name in KEY}, **dict.fromkeys(FIGURES)}


def key(row: Row) -> tuple[Any, ...]:
    """What tells a row from others, without the batch where that was searched for. Rows older than `whole` are of training
    steps alone, those older than `graphed` of passes without graphs."""
    return tuple(None if name == "batch" and row["search"] else row.get(name, False) for name in KEY)


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """One table per model; columns without any value are left out."""
    console = console or Console(width=150)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [{**row, "mode": f"{row['mode']}, graphed"} if row.get("graphed") else row for row in rows if row["model"] == model]
        shown = [column for column in COLUMNS if any(row.get(column[1]) is not None for row in own)]
        cells = [tuple(_cell(row.get(entry), unit, form) for _, entry, unit, form in shown) for row in own]
        console.print(rich_table(model, [header for header, *_ in shown], cells))
        for row in own:
            if row["note"]:
                console.print(f"{row['adapter']}, {row['mode']}, batch {row['batch']}: {row['note']}", markup=False)


COLUMNS: tuple[tuple[str, str, int, str], ...] = (  # header, entry of a row, unit, format
    ("adapter", "adapter", 0, ""),
    ("mode", "mode", 0, ""),
    ("base", "base", 0, ""),
    ("optimizer", "optimizer", 0, ""),
    ("batch", "batch", 1, "g"),
    ("parameters", "parameters", 1, ",.0f"),
    ("kept GiB", "saved_bytes", GIB, ".3f"),
    ("on paper", "budget_bytes", GIB, ".3f"),
    ("peak GiB", "peak_bytes", GIB, ".2f"),
    ("reserved", "reserved_bytes", GIB, ".2f"),
    ("cap", "cap_bytes", GIB, ".3g"),
    ("TFLOP", "flops", 10**12, ".2f"),
    ("s / step", "seconds_per_step", 1, ".3f"),
    ("on device", "device_seconds", 1, ".3f"),
    ("update", "update_seconds", 1, ".3f"),
    ("images / s", "images_per_second", 1, ".2f"),
)


def _cell(value: Any, unit: int, form: str) -> str:
    if value is None:
        return "–"
    return format(value / unit, form) if unit else str(value)
