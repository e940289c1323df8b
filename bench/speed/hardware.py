"""What is known of the measured card."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Card:
    """flops: dense FLOP/s in 16 bit. bandwidth: bytes/s. Both are measured on such a card, not taken from its specification."""

    flops: float
    bandwidth: float


CARDS = {"H200": Card(790e12, 4.3e12)}  # by a part of the device's name


def roofline_ms(device: str, dtype: torch.dtype, flops: float, weight_bytes: int) -> float | None:
    """The least milliseconds of a step that reads every weight once; None for an unknown card or dtype.

    device: its name.
    """
    card = next((card for name, card in CARDS.items() if name in device), None)
    if card is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    return max(flops / card.flops, weight_bytes / card.bandwidth) * 1e3


@contextmanager
def quiet(lock: Path | None) -> Iterator[None]:
    """Context for taking times: no other process takes any, and all other process groups named in the file `lock` are stopped."""
    if lock is None:
        yield
        return
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        others = [group for group in map(int, file.read().split()) if group != os.getpgrp()]
        signal_groups(others, signal.SIGSTOP)
        try:
            yield
        finally:
            signal_groups(others, signal.SIGCONT)


def signal_groups(groups: Iterable[int], what: signal.Signals) -> None:
    """Signals process groups; those that have ended are skipped."""
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, what)


def gpu_state() -> dict[str, str]:
    """Clocks, power limit and driver as nvidia-smi reports them; empty without nvidia-smi."""
    names = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return {}
    return dict(zip(names, found.stdout.strip().split(", "), strict=False)) if found.returncode == 0 else {}
