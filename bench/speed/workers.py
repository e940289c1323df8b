"""Arms in processes of their own, made at the same time: compiling keeps a CPU busy for minutes, and a card hardly at all."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speed.measure import Kernels, kernels

Runs = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Worker:
    """A process that holds some arms."""

    process: Any
    connection: Any

    def made(self, seconds: float = math.inf) -> Any:
        """The result of making its arms; waits for it. Raises: EOFError when the process has ended, TimeoutError when the arms
        are not made in this time, after which the process is ended."""
        if not self.connection.poll(None if seconds == math.inf else seconds):
            self.process.kill()
            raise TimeoutError
        return self.connection.recv()

    def run(self, arm: str) -> None:
        """Returns when its device has finished."""
        self.connection.send((arm, ""))
        self.connection.recv()

    def output(self, arm: str) -> Tensor:
        """The result of a run, float32 on the CPU."""
        self.connection.send((arm, "output"))
        return torch.from_numpy(self.connection.recv())

    def kernels(self, arm: str) -> Kernels:
        """The kernels of a run, on CUDA."""
        self.connection.send((arm, "kernels"))
        return self.connection.recv()


@contextmanager
def workers(make: Mapping[str, Callable[[], tuple[Any, Runs]]]) -> Iterator[dict[str, Worker]]:
    """One worker per name. It first calls its function, which returns what to report of its arms, and those that can run."""
    context = multiprocessing.get_context("spawn")
    started: dict[str, Worker] = {}
    try:
        for name, function in make.items():
            here, there = context.Pipe()
            process = context.Process(target=partial(_serve, there, function))
            process.start()
            there.close()
            started[name] = Worker(process, here)
        yield started
    finally:
        for worker in started.values():
            worker.connection.close()  # this ends the worker
        for worker in started.values():
            worker.process.join()


def _serve(connection: Any, make: Callable[[], tuple[Any, Runs]]) -> None:
    told, runs = make()
    connection.send(told)
    while True:
        try:
            arm, wanted = connection.recv()
        except EOFError:
            return
        if wanted == "kernels":
            connection.send(kernels(runs[arm]))
            continue
        output = runs[arm]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        connection.send(output.float().cpu().numpy() if wanted else None)
