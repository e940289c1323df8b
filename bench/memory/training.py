"""Real training steps on a card: forward, backward, the optimizer's step; their time and peak memory, under a cap or not."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agd_fast.adapters import count_parameters
from agd_fast.attaching import armed, require_attachment
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.loss import distillation_loss
from agd_fast.families import find_spec
from agd_fast.forward import nest
from agd_fast.memory.base_weights import packed_base
from agd_fast.memory.estimate import keeping
from agd_fast.memory.optimizer import HostAdamW
from memory.rows import CHECKPOINTING, EAGER, MINCUT, Row, empty_row
from memory.students import arguments, student
from speed.architectures import Architecture, find_architecture
from speed.hardware import quiet
from speed.measure import kernels as kernels_of

IMAGES = 32  # per step of the optimizer, as in the presets
NEARLY = 0.95  # share of the card's remaining memory that the first guess of a batch fills


class Training:
    """A student and its optimizer on a device, in one of the ways to keep less."""

    def __init__(self, architecture: Architecture, row: Row, device: torch.device) -> None:
        self.architecture, self.device, self.dtype = architecture, device, getattr(torch, row["dtype"])
        self.mode, self.base = row["mode"], row["base"]
        self.denoiser = student(architecture, row["adapter"], device, self.dtype)
        self.spec, self.attachment = find_spec(self.denoiser), require_attachment(self.denoiser)
        host = (row["optimizer"] or ("adamw" if self.mode in (EAGER, CHECKPOINTING, MINCUT) else "host")) == "host"
        parameters = list(self.attachment.adapter.parameters())
        self.optimizer: torch.optim.Optimizer = (HostAdamW if host else torch.optim.AdamW)(parameters, lr=1e-4, weight_decay=0.0)
        self.graphs = Passes(parameters, device, host=host) if row.get("graphed") else None
        # The most that was allocated while a graph was made: no counter tells what is in use inside a graph. It includes the room
        # that was asked for the optimizer's step.
        self.recording_bytes = 0
        self.call: Any = torch.compile(self.denoiser, dynamic=False) if self.mode == MINCUT else self.denoiser

    @contextmanager
    def scope(self) -> Iterator[None]:
        """The context of all steps."""
        with ExitStack() as stack:
            if self.base is not None:
                stack.enter_context(packed_base(self.denoiser, self.base))
            if self.mode not in (EAGER, MINCUT):
                stack.enter_context(keeping(self.denoiser, self.mode))
            if self.graphs is not None:
                stack.enter_context(self.graphs)
            yield

    def passes(self, batch: int, graphed: bool = True) -> Callable[[], Tensor]:
        """Forward and backward of a fixed batch → its loss. Gradients add up until the optimizer's step. graphed: whether as a
        graph, if the row asks for one."""
        inputs = arguments(self.architecture, batch, self.device, self.dtype)
        call, x = nest(inputs), inputs[self.spec.sample]
        omega = torch.linspace(2.0, 5.0, batch, device=self.device)
        target = torch.randn(x.shape, device=self.device, generator=torch.Generator(self.device).manual_seed(1))

        def run() -> Tensor:
            with armed(self.attachment, omega):
                prediction = self.call(**call, return_dict=False)[0]
            loss = distillation_loss(prediction[:, : x.shape[1]], target, omega, "l2", "omega")
            loss.backward()
            return loss.detach()

        return run if self.graphs is None or not graphed else partial(self.graphs, lambda _: run(), [], key=batch)

    def step(self) -> None:
        if self.graphs is not None:
            self._end_batch(self.graphs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _end_batch(self, graphs: Passes) -> None:
        """Tells the graphs that a batch has ended, which is when one is made; notes its peak memory."""
        counted = self.device.type == "cuda" and not graphs.held
        if counted:
            torch.cuda.reset_peak_memory_stats(self.device)
        graphs.end_batch()
        if counted and graphs.held:
            self.recording_bytes = torch.cuda.max_memory_allocated(self.device)


def train_row(
    row: Row, seconds: float, architecture: Architecture | None = None, images: int = IMAGES, lock: Path | None = None
) -> Row:
    """`row` with its figures, measured on its device for about `seconds`; the note says where memory ran out. images: per step
    of the optimizer. lock: see `speed.hardware.quiet`."""
    device = torch.device(row["device"])
    cap(row["cap_bytes"], device)
    found = empty_row(row)
    try:
        training = Training(architecture or find_architecture(row["model"]), row, device)
        found["parameters"] = count_parameters(training.attachment.adapter)
        with training.scope():
            batch = _largest(training, row["cap_bytes"]) if row["search"] else row["batch"]
            found |= {"batch": batch, **_measure(training, batch, seconds, images, lock)}
            if training.graphs is not None:
                if found["peak_bytes"] is not None:
                    found["peak_bytes"] = max(found["peak_bytes"], training.recording_bytes)
                found["note"] = training.graphs.info()["plain_because"] or None
    except torch.OutOfMemoryError as error:
        found["note"] = f"out of memory: {str(error).splitlines()[0]}"[:200]
    return found


def _measure(training: Training, batch: int, seconds: float, images: int, lock: Path | None) -> Row:
    """Measures groups of passes, each followed by one step of the optimizer, as when a batch is split into micro-batches."""
    run, device = training.passes(batch), training.device
    group = max(1, -(-images // batch))
    for _ in range(2):
        run()
        training.step()
    cuda = device.type == "cuda"
    if cuda:
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times, updates = list[float](), list[float]()
    with quiet(lock):
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            began = time.perf_counter()
            for _ in range(group):
                loss = run()
            _synchronize(device)
            passed = time.perf_counter()
            training.step()
            _synchronize(device)
            times.append((time.perf_counter() - began) / group)
            updates.append(time.perf_counter() - passed)
        kernels = kernels_of(run) if cuda else None
    median = statistics.median(times)
    print(f"  batch {batch}: {median:.3f} s a pass and its share of a step", file=sys.stderr, flush=True)
    return {
        "seconds_per_step": median,
        "update_seconds": statistics.median(updates),
        "device_seconds": None if kernels is None else kernels.seconds,
        "images_per_second": batch / median,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
        "loss": float(loss),
    }


def _largest(training: Training, size: int) -> int:
    """The largest batch, to within a sixteenth, with which two steps of the optimizer fit into `size` bytes: tries 1 and 2, then
    the batch that should fit, then others near it.

    Raises: torch.OutOfMemoryError where not even one sample fits.
    """
    one = _peak(training, 1)
    if one is None:
        raise torch.OutOfMemoryError("not even a batch of 1 fits")
    two = _peak(training, 2)
    if two is None:
        return 1
    least, most = 2, None
    batch = max(3, 2 + int(NEARLY * (size - two) / max(two - one, 1)))
    while most is None or most - least > max(1, least // 16):
        if _peak(training, batch) is None:
            most = batch
            batch = max(least + 1, most - max(1, most // 16))
        else:
            least = batch
            batch = least + max(1, least // 16)
    return least


def _peak(training: Training, batch: int) -> int | None:
    """The peak allocation in bytes; None where the batch does not fit."""
    cuda = training.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(training.device)
    try:
        _steps(training, batch)
        found = torch.cuda.max_memory_allocated(training.device) if cuda else 0
    except torch.OutOfMemoryError:
        found = None
    training.optimizer.zero_grad()
    gc.collect()
    if training.device.type == "cuda":
        torch.cuda.empty_cache()
    print(f"  batch {batch} {'does not fit' if found is None else 'fits'}", file=sys.stderr, flush=True)
    return found


def _steps(training: Training, batch: int) -> None:
    run = training.passes(batch, graphed=False)
    for _ in range(2):
        run()
        run()
        training.step()
    _synchronize(training.device)


def cap(size: int | None, device: torch.device) -> None:
    """Limits the memory that this process can allocate to `size` bytes."""
    if size is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.set_per_process_memory_fraction(min(size / total, 1.0), index)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
