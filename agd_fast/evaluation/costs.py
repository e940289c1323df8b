"""What a picture costs: evaluations counted, seconds by interleaved timing, peak GPU memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agd_fast.attaching.steps import before_forward
from agd_fast.evaluation.speed import Timing, time_interleaved


@dataclass(frozen=True)
class Cost:
    """What a picture costs.

    nfe: denoiser evaluations per picture.
    seconds: per picture; None if it was not timed.
    timing: of calls of `batch` pictures.
    peak_bytes: the most that was allocated on the CUDA device during the first call, including what earlier calls left there;
        None on other devices.
    """

    nfe: float
    batch: int
    seconds: float | None = None
    timing: Timing | None = None
    peak_bytes: int | None = None


def costs_of(
    runs: Mapping[str, Callable[[], object]],
    denoisers: Collection[nn.Module],
    *,
    sample: str,
    batch: int,
    rounds: int,
    device: torch.device,
    progress: bool = False,
) -> dict[str, Cost]:
    """The costs of calls that make `batch` pictures each.

    denoisers: as compiled modules if compiled. sample: the name of their argument x_t. rounds: 0 leaves timing out.
    """
    cuda = device.type == "cuda"
    counted: dict[str, tuple[float, int | None]] = {}
    for name, run in runs.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        with ExitStack() as stack:
            counts = [stack.enter_context(_counted(denoiser, sample)) for denoiser in denoisers]
            run()
        counted[name] = sum(map(sum, counts)) / batch, torch.cuda.max_memory_allocated(device) if cuda else None
    timing = time_interleaved(runs, rounds=rounds, warmup=1, device=device, progress=progress) if rounds else {}
    return {
        name: Cost(
            nfe,
            batch,
            seconds=timing[name].median / batch if name in timing else None,
            timing=timing.get(name),
            peak_bytes=peak,
        )
        for name, (nfe, peak) in counted.items()
    }


@contextmanager
def _counted(denoiser: nn.Module, sample: str) -> Iterator[list[int]]:
    """Collects the number of samples of every forward, unseen by the engine and torch.compile."""
    found: list[int] = []

    def note(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(len(args[0] if args else kwargs[sample]))

    with before_forward(denoiser, note):
        yield found
