"""Where a run's time goes: on the device by kernel, on the host by function."""

from __future__ import annotations

import cProfile
import io
import pstats

import torch

from speed.measure import Kernels, Run


def print_kernels(name: str, found: Kernels) -> None:
    """name: of the arm; `found`: the kernels of one run of it."""
    print(f"{name}: {found.launches} kernels, {found.seconds * 1e3:.2f} ms of a run on the device; the longest, in ms:")
    for kernel, count, seconds in found.longest:
        print(f"{seconds * 1e3:10.3f} {count:6d} x {kernel[:120]}", flush=True)


def print_host_profile(name: str, run: Run, shown: int = 30) -> None:
    """Host functions of one run. While other processes use the host they take longer than alone: only their shares matter."""
    profiler = cProfile.Profile()
    profiler.runcall(run)
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(shown)
    print(f"{name}, on the host:\n{text.getvalue()}", flush=True)
