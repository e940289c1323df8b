"""What is known of the card that is measured on."""

from __future__ import annotations

import fcntl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Card:
    """flops: dense FLOP/s in 16 bit. bandwidth: bytes/s. Both as measured on such a card, not as specified."""

    flops: float
    bandwidth: float


CARDS = {"H200": Card(790e12, 4.3e12)}  # by a part of the device's name


def roofline_ms(device: str, dtype: torch.dtype, flops: float, weight_bytes: int) -> float | None:
    """Milliseconds below which no step can be that reads every weight once; None for an unknown card or dtype.

    device: its name.
    """
    card = next((card for name, card in CARDS.items() if name in device), None)
    if card is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    return max(flops / card.flops, weight_bytes / card.bandwidth) * 1e3


@contextmanager
def busy(lock: Path | None) -> Iterator[None]:
    """While something is compiled or checked that may go on beside other such things. lock: file that all of them share."""
    with _locked(lock, fcntl.LOCK_SH):
        yield


@contextmanager
def quiet(lock: Path | None) -> Iterator[None]:
    """While times are taken: waits until nobody is busy, and nobody begins to be."""
    with _locked(lock, fcntl.LOCK_EX):
        yield


@contextmanager
def _locked(lock: Path | None, how: int) -> Iterator[None]:
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, how)
        yield


def gpu_state() -> dict[str, str]:
    """Clocks, power limit and driver as nvidia-smi tells them; empty where there is none."""
    names = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return {}
    return dict(zip(names, found.stdout.strip().split(", "), strict=False)) if found.returncode == 0 else {}
