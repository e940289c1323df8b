"""Where a run's time goes: on the device by kernel, on the host by function."""

from __future__ import annotations

import cProfile
import io
import pstats

import torch

from speed.measure import Run, kernels


def print_profile(name: str, run: Run, shown: int = 30) -> None:
    """name: of the arm. Of two runs, one after another; on a card that others use kernels take longer than by themselves."""
    found = kernels(run)
    print(f"{name}: {found.launches} kernels, {found.seconds * 1e3:.2f} ms of a run on the device; the longest, in ms:")
    for kernel, count, seconds in found.longest:
        print(f"{seconds * 1e3:10.3f} {count:6d} x {kernel[:120]}")
    profiler = cProfile.Profile()
    profiler.runcall(run)
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(shown)
    print(text.getvalue(), flush=True)
