"""Every op on its kernel, in eager PyTorch and compiled: `pytest bench/ --benchmark-only`, `-k` picks ops, models and arms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from agd_fast.ops import kernels_info
from speed.kernels import BATCHES, ODD, OPS, Case, Ceiling, Pass, Random, figures, passes_of, real_cases, rotated, time_passes

CUDA = torch.cuda.is_available()
ARMS = ("eager",) if not CUDA else ("eager", "compiled") if kernels_info()["missing"] else ("eager", "compiled", "kernel")
CASES = real_cases() if CUDA else [Case(OPS[name], "small", ODD[name][0]) for name in sorted(OPS)]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("batch", BATCHES if CUDA else (1,), ids="batch={}".format)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_op(benchmark: Any, ceiling: Ceiling | None, case: Case, batch: int, arm: str) -> None:
    benchmark.group = f"{case} batch={batch}"
    run, about = _on_cuda(case, batch, arm, ceiling) if ceiling else _on_cpu(case, batch)
    benchmark.extra_info.update(about)
    benchmark(run)


def _on_cpu(case: Case, batch: int) -> tuple[Callable[[], Any], dict[str, Any]]:
    args = case.arguments(Random(torch.float32, "cpu"), batch)
    return lambda: case.op.reference(*args), {"device": "cpu", "dtype": "float32"}


def _on_cuda(case: Case, batch: int, arm: str, ceiling: Ceiling) -> tuple[Callable[[], Any], dict[str, Any]]:
    """One replay of the CUDA graph of the arm's fastest way, run to its end; figures per call by CUDA events."""
    inputs = rotated(case, batch, torch.bfloat16)
    passes, reasons = passes_of(case, inputs, lambda name: name.partition(" ")[0] == arm)
    if not passes:
        pytest.fail(f"{arm}: {reasons}")
    times = time_passes(passes)
    best = min(times, key=lambda name: times[name][1])
    low, median, high = (ms / passes[best].calls for ms in times[best])
    about = {"device": torch.cuda.get_device_name(), "dtype": "bfloat16", "way": best, "calls": passes[best].calls}
    about |= {"ms": median, "ms_p20": low, "ms_p80": high, **figures(case.op, inputs[0], median, ceiling)}
    return _until_done(passes[best]), about


def _until_done(one: Pass) -> Callable[[], None]:
    def run() -> None:
        one()
        torch.cuda.synchronize()

    return run
