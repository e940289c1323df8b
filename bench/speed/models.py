"""Measuring the arms on a full-size model with random weights."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agd_fast.engine import engine_of
from speed.architectures import Architecture, find_architecture
from speed.arms import ARMS, Arm, Workbench, note_of, untimed, weight_bytes
from speed.hardware import quiet
from speed.measure import Keep, Kernels, Measured, Row, Run, attempt, compare, kernels, rows_of, time_runs
from speed.profiles import print_host_profile, print_kernels
from speed.reference import ReferenceAdapters
from speed.workers import Worker, workers

# the arm with the same operations, uncompiled
COUNTED_AS = {"cfg_compiled": "cfg", "agd_engine": "agd_hoisted", "agd_engine_whole": "agd_hoisted"}
LATE = "not made in time"


@dataclass(frozen=True)
class Settings:
    """Settings for all arms of a benchmark.

    kind: of our adapter; None takes the backbone's default. compiled: whether the engine compiles.
    counts: rows of an earlier run, whose FLOPs are used instead of counting again.
    eager_steps: how many last steps of the schedule to time arms on that compute nothing ahead; None: all.
    profile: whether to print the kernels and host functions that take longest in a run of each arm.
    processes: whether arms are made at the same time, each in its own. patience: seconds after which such an arm is skipped.
    lock: see `speed.hardware`.
    """

    arms: Sequence[str]
    steps: int
    rounds: int
    dtype: torch.dtype
    device: torch.device
    guidance_scale: float
    kind: str | None = None
    reference: ReferenceAdapters | None = None
    compiled: bool = True
    counts: Sequence[Row] = ()
    eager_steps: int | None = None
    profile: bool = False
    processes: bool = False
    patience: float = math.inf
    lock: Path | None = None


def measure_model(
    name: str,
    batches: Sequence[int],
    settings: Settings,
    architecture: Architecture | None = None,
    keep: Keep = lambda rows: None,
) -> list[Row]:
    """Rows of a model, arm by arm and batch by batch. architecture: None takes the model's. keep: is given the rows so far,
    after every arm that is made and every round.

    FLOPs are counted on the meta device, uncompiled, as are launches where there is no CUDA to profile. Times,
    kernels and memory are taken on the settings' device, unless that is meta.
    Raises: ValueError for an unknown model.
    """
    architecture = architecture or find_architecture(name)
    rows: list[Row] = []
    card = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else ""

    def with_rows(batch: int, measured: Mapping[str, Measured]) -> list[Row]:
        own = rows_of(measured, model=name, batch=batch, steps=settings.steps, dtype=settings.dtype, device=card)
        return [*rows, *own]

    def keep_rows(batch: int, measured: Mapping[str, Measured]) -> None:
        keep(with_rows(batch, measured))

    denoiser = None
    for batch in batches:
        measured = _counted(name, batch, settings) if settings.counts else _count(architecture, batch, settings)
        kept = partial(keep_rows, batch, measured)
        if settings.processes:
            _time_processes(name, batch, measured, settings, kept)
        elif settings.device.type != "meta":
            bench = _workbench(architecture, batch, settings, settings.device, denoiser=denoiser)
            denoiser = bench.denoiser
            _time(bench, measured, settings, kept)
        rows = with_rows(batch, measured)
    return rows


def _counted(name: str, batch: int, settings: Settings) -> dict[str, Measured]:
    """The arms with their FLOPs from earlier rows."""
    own = (name, batch, settings.steps, str(settings.dtype).removeprefix("torch."))
    found = {arm: Measured() for arm in settings.arms}
    for row in settings.counts:
        adapter = row["adapter"]
        of_kind = settings.kind is None or adapter is None or row["arm"] == "agd_naive" or adapter["kind"] == settings.kind
        if row["arm"] in found and of_kind and (row["model"], row["batch"], row["steps"], row["dtype"]) == own:
            found[row["arm"]].flops = row["flops_per_step"] * row["steps"]
    return found


def _count(architecture: Architecture, batch: int, settings: Settings) -> dict[str, Measured]:
    bench = _workbench(architecture, batch, settings, torch.device("meta"), counted=True)
    counted = {COUNTED_AS.get(name, name): Measured() for name in settings.arms}
    for name, one in counted.items():
        attempt(one, partial(_count_arm, bench, name))
        one.failed = False  # it may still run
    measured = {name: replace(counted[COUNTED_AS.get(name, name)]) for name in settings.arms}
    if "cfg_compiled" in measured:
        measured["cfg_compiled"].launches = None
    return measured


def _count_arm(bench: Workbench, name: str, one: Measured) -> None:
    arm = bench.arm(name)
    counts = bench.count(arm)
    one.flops, one.launches = counts.flops, counts.launches.total()
    _describe(arm, bench, one)


def _time(bench: Workbench, measured: dict[str, Measured], settings: Settings, keep: Callable[[], None]) -> None:
    runs: dict[str, Run] = {}
    for name, one in _timed(measured, bench.device).items():
        attempt(one, partial(_make_run, bench, name, settings, runs))
        keep()
    compare({name: run().float() for name, run in runs.items()}, measured)
    with quiet(settings.lock):
        time_runs(runs, measured, settings.rounds, bench.device, keep)
        for name, run in runs.items() if bench.device.type == "cuda" else ():
            _count_kernels(name, kernels(run), measured[name], settings)
            keep()


def _timed(measured: Mapping[str, Measured], device: torch.device) -> dict[str, Measured]:
    """Without the arms that are not timed on this device; their notes say why."""
    reasons = {name: untimed(name, device) for name in measured}
    for name, one in measured.items():
        one.note = "; ".join(filter(None, [one.note, reasons[name]])) or None
    return {name: one for name, one in measured.items() if not reasons[name]}


def _time_processes(name: str, batch: int, measured: dict[str, Measured], settings: Settings, keep: Callable[[], None]) -> None:
    """Like `_time`, but on several denoisers with the same weights: one for each compiled arm, one for all others."""
    timed = _timed(measured, settings.device)
    groups = {arm: [arm] for arm in timed if ARMS[arm].compiled}
    groups["eager"] = [arm for arm in timed if not ARMS[arm].compiled]
    make = {group: partial(_made, arms, name, batch, settings) for group, arms in groups.items() if arms}
    late = time.monotonic() + settings.patience
    with workers(make) as found:
        of_arm = {arm: found[group] for group, arms in groups.items() for arm in arms}
        began = time.monotonic()
        for group, worker in found.items():
            for arm, one in _made_by(worker, groups[group], late).items():
                _take(one, measured[arm])
            keep()
            print(f"{name} at batch {batch}: {group} was waited for until {time.monotonic() - began:.0f} s", flush=True)
        sound = {arm: worker for arm, worker in of_arm.items() if not measured[arm].failed}
        compare({arm: worker.output(arm) for arm, worker in sound.items()}, measured)
        print(f"{name} at batch {batch}: made", flush=True)
        with quiet(settings.lock):
            runs = {arm: partial(worker.run, arm) for arm, worker in sound.items()}
            time_runs(runs, measured, settings.rounds, torch.device("cpu"), keep)  # workers wait for their own device
            for arm, worker in sound.items() if settings.device.type == "cuda" else ():
                _count_kernels(arm, worker.kernels(arm), measured[arm], settings)
                keep()


def _made_by(worker: Worker, arms: Sequence[str], late: float) -> dict[str, Measured]:
    try:
        return worker.made(max(late - time.monotonic(), 0.0))
    except TimeoutError:
        return {arm: Measured(failed=True, note=LATE) for arm in arms}
    except EOFError:
        return {arm: Measured(failed=True, note="its process ended") for arm in arms}


def _made(arms: Sequence[str], name: str, batch: int, settings: Settings) -> tuple[dict[str, Measured], dict[str, Run]]:
    """In a worker: what was measured of the arms so far, and their runs, compiled in full."""
    found, runs = {arm: Measured() for arm in arms}, dict[str, Run]()
    bench = _workbench(find_architecture(name), batch, settings, settings.device)
    for arm, one in found.items():
        attempt(one, partial(_make_run, bench, arm, settings, runs))
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # other workers need the memory
    return found, runs


def _take(made: Measured, one: Measured) -> None:
    """Adds what a worker measured to what was counted."""
    one.failed, one.note = made.failed, "; ".join(dict.fromkeys(filter(None, [one.note, made.note]))) or None
    for field in fields(made):
        if field.name not in ("failed", "note") and (value := getattr(made, field.name)) is not None:
            setattr(one, field.name, value)


def _make_run(bench: Workbench, name: str, settings: Settings, runs: dict[str, Run], one: Measured) -> None:
    """Make an arm and run it until it is fully compiled and captured; records its memory as if only it and the base existed."""
    cuda = bench.device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        others = torch.cuda.memory_allocated(bench.device) - weight_bytes(bench.denoiser)
    arm = bench.arm(name)
    if settings.eager_steps and not ARMS[name].compiled and engine_of(arm.denoiser) is None:
        one.timed_steps = min(settings.eager_steps, settings.steps)
    run = partial(bench.run, arm, one.timed_steps)
    run()
    run()
    _describe(arm, bench, one)
    if cuda:
        torch.cuda.synchronize(bench.device)
        one.peak_memory = torch.cuda.max_memory_allocated(bench.device) - others
        if settings.profile:
            print_host_profile(name, run)
    runs[name] = run


def _count_kernels(name: str, found: Kernels, one: Measured, settings: Settings) -> None:
    share = settings.steps / (one.timed_steps or settings.steps)
    one.launches, one.device_seconds = found.launches * share, found.seconds * share
    if settings.profile:
        print_kernels(name, found)


def _describe(arm: Arm, bench: Workbench, one: Measured) -> None:
    """Notes what is known of an arm that has run."""
    one.nfe, one.weight_bytes, one.adapter = arm.passes * len(bench.times), arm.weight_bytes, arm.adapter
    one.note = "; ".join(dict.fromkeys(filter(None, [one.note, note_of(arm.denoiser)]))) or None


def _workbench(architecture: Architecture, batch: int, settings: Settings, device: torch.device, **options: Any) -> Workbench:
    return Workbench(
        architecture,
        batch,
        settings.steps,
        device,
        settings.dtype,
        kind=settings.kind,
        omega=settings.guidance_scale,
        reference=settings.reference,
        compiled=settings.compiled,
        **options,
    )
