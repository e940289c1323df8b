"""Runs tasks in order, many at a time, until the session's end."""

from __future__ import annotations

import fcntl
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from session.results import Results
from session.tasks import Stage, Task
from speed.hardware import signal_groups

BENCH = Path(__file__).parents[1]
TICK, PACK_EVERY = 0.2, 15.0  # seconds
PATIENCE = 60.0  # seconds that the slowest model's times take
LAST_ROW = 45.0  # seconds that a row of distill_memory.py takes
THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # for each of many processes


@dataclass(frozen=True)
class Running:
    task: Task
    stage: int
    process: subprocess.Popen[bytes]
    began: float


class Session:
    """stages: lists of tasks; finished ones are not run again. deadline: by `time.monotonic`; what still runs then is killed.
    jobs: processes at the same time. tar: file that holds all results, from the beginning on and after every task."""

    def __init__(self, stages: Sequence[Stage], results: Results, deadline: float, jobs: int, tar: Path | None = None) -> None:
        self.results, self.deadline, self.jobs, self.tar = results, deadline, jobs, tar
        self.lock = results.output / "lock"
        self.running: list[Running] = []
        self.left: list[str] = []
        self.failed: list[str] = []
        self.tasks = [(number, task) for number, stage in enumerate(stages) for task in stage]
        self.waiting = [(number, task) for number, task in self.tasks if not self._is_done(task)]

    def run(self) -> None:
        """Runs the tasks. Whatever exception ends it, no process of a task outlives it, and the tar is written."""
        self.results.output.mkdir(parents=True, exist_ok=True)
        self._publish()
        packed = -math.inf
        try:
            while self.waiting or self.running:
                if time.monotonic() >= self.deadline:
                    break
                if self._end() or time.monotonic() - packed >= PACK_EVERY:
                    self._pack()
                    packed = time.monotonic()
                self._begin()
                time.sleep(TICK)
        finally:
            for one in self.running:
                signal_groups([one.process.pid], signal.SIGKILL)
                one.process.wait()
                self._say(one, "no time left")
            self.left += [*(one.task.name for one in self.running), *(task.name for _, task in self.waiting)]
            self._publish()
            self._pack()

    def _is_done(self, task: Task) -> bool:
        return self.results.whole(task.name) is not None or self.results.waits(task.name)

    def _begin(self) -> None:
        """Starts the tasks whose turn it is, unless times are being taken. Continues processes that a killed task had stopped."""
        with self.lock.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            signal_groups(self._groups(), signal.SIGCONT)
            for stage, task in list(self.waiting):
                left = self.deadline - time.monotonic()
                if left < task.least:
                    self.waiting.remove((stage, task))
                    self.left.append(task.name)
                elif task.times and self._is_early(stage):
                    continue
                elif self.running and sum(one.task.processes for one in self.running) + task.processes > self.jobs:
                    break
                else:
                    self.waiting.remove((stage, task))
                    self.running.append(self._start(stage, task, left))
            file.truncate(0)
            file.write("\n".join(map(str, self._groups())))

    def _is_early(self, stage: int) -> bool:
        """Whether times of an earlier stage are still to be taken."""
        theirs = [*self.waiting, *((one.stage, one.task) for one in self.running)]
        return any(task.times and other < stage for other, task in theirs)

    def _start(self, stage: int, task: Task, left: float) -> Running:
        path = self.results.place(task.name, task.needs)
        log = self.results.output / f"logs/{task.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "{json}": str(path),
            "{lock}": str(self.lock),
            "{output}": str(self.results.output),
            "{minutes}": f"{max(left - LAST_ROW, 0) / 60:.2f}",
            "{patience}": f"{max(left - PATIENCE, 0):.0f}",
        }
        command = [sys.executable, *(_filled(part, values) for part in task.command)]
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                cwd=BENCH,
                env={**THREADS, **os.environ, **task.settings, "TORCHINDUCTOR_CACHE_DIR": str(_cache() / task.name)},
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=partial(_apart, 10 if task.is_check and stage else 0),
            )
        return Running(task, stage, process, time.monotonic())

    def _groups(self) -> list[int]:
        return [one.process.pid for one in self.running]

    def _end(self) -> bool:
        """Record the tasks that have ended; returns whether any has."""
        ended = [one for one in self.running if one.process.poll() is not None]
        for one in ended:
            self.running.remove(one)
            signal_groups([one.process.pid], signal.SIGKILL)  # processes that it may have left behind
            code = one.process.returncode
            if code and not (one.task.is_check and self.results.whole(one.task.name)):  # a red check has done its work
                self.failed.append(one.task.name)
            self._say(one, "done" if not code else f"failed ({code})")
        if ended:
            self._publish()
        return bool(ended)

    def _publish(self) -> None:
        for _, task in self.tasks:
            if task.needs:
                self.results.publish(task.name, task.needs)

    def _say(self, one: Running, what: str) -> None:
        print(f"{one.task.name}: {what} after {time.monotonic() - one.began:.0f} s", flush=True)

    def _pack(self) -> None:
        if self.tar is not None:
            self.results.pack(self.tar)


def _cache() -> Path:
    """Folder of inductor's caches, one per task: a stopped process may hold a lock in its own."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / "agd_fast_inductor")


def _filled(part: str, values: Mapping[str, Any]) -> str:
    for name, value in values.items():
        part = part.replace(name, value)
    return part


def _apart(niceness: int) -> None:
    """Run at the start of a process: gives it its own group, so that it can be stopped and ended with all that it starts."""
    os.setpgrp()
    os.nice(niceness)
