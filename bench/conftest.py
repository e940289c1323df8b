"""`pytest bench/ --benchmark-only`: the kernels beside PyTorch, on whatever device is there."""

from __future__ import annotations

import pytest
import torch

from speed.kernels import INPUTS, L2, Ceiling, measure_ceiling


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "benchmark_only", False):  # the --benchmark-disable of the tests' own settings contradicts it
        config.option.benchmark_disable = False


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("what was measured")
    terminalreporter.write_line(_about())


def _about() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device: one small shape an op on the CPU, of the references alone; no figure of a kernel"
    rotated = f"{L2 / 2**20:.0f} MiB of different arguments or {INPUTS}"
    return f"{torch.cuda.get_device_name()}: a round is a CUDA graph of calls on {rotated}; ms in extra_info are of one call"


@pytest.fixture(scope="session")
def ceiling() -> Ceiling | None:
    """The card's peak rates, measured once."""
    return measure_ceiling() if torch.cuda.is_available() else None
