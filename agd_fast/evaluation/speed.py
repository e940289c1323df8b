"""Timing several ways to do one thing fairly: warmed up, interleaved, in an order that rotates every round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and the 20th and 80th percentile over `rounds`, and those of every round."""

    median: float
    p20: float
    p80: float
    rounds: int
    seconds: tuple[float, ...]

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        p20, median, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
        return cls(median, p20, p80, len(seconds), tuple(seconds))

    def over(self, other: Timing) -> Timing:
        """The ratio to `other`, round by round: what slows a whole round does not change it."""
        return Timing.of([mine / theirs for mine, theirs in zip(self.seconds, other.seconds, strict=True)])


def time_interleaved(
    arms: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup: int = 2,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, Timing]:
    """Time every arm once per round, so that a drift of the machine affects all alike."""
    return [*interleaved_rounds(arms, rounds=rounds, warmup=warmup, device=device, progress=progress)][-1]


def interleaved_rounds(
    arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: torch.device | str, progress: bool
) -> Iterator[dict[str, Timing]]:
    """As `time_interleaved`, but yields after every round the timings of the rounds so far."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(-warmup, rounds), desc="timing", disable=not progress, leave=False):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            _synchronize(device)
            start = time.perf_counter()
            arms[name]()
            _synchronize(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
        if turn >= 0:
            yield {name: Timing.of(values) for name, values in seconds.items()}


def _synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
