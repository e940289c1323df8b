"""Measuring the arms on a model of full size with random weights."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from speed.architectures import Architecture, find_architecture
from speed.arms import Arm, Workbench, note_of, untimed, weight_bytes
from speed.measure import Measured, Row, Run, attempt, kernels, rows_of, time_runs
from speed.reference import ReferenceAdapters

COUNTED_AS = {"cfg_compiled": "cfg", "agd_engine": "agd_hoisted"}  # the same operations, where nothing is compiled


@dataclass(frozen=True)
class Settings:
    """What holds for all arms of a benchmark. kind: of our adapter; None takes the backbone's."""

    arms: Sequence[str]
    steps: int
    rounds: int
    dtype: torch.dtype
    device: torch.device
    guidance_scale: float
    kind: str | None = None
    reference: ReferenceAdapters | None = None


def measure_model(name: str, batches: Sequence[int], settings: Settings, architecture: Architecture | None = None) -> list[Row]:
    """Rows of a model, arm by arm and batch by batch. architecture: None takes the model's.

    FLOPs are counted on the meta device, as are launches where there is no CUDA to profile: of what is not compiled. Times,
    kernels and memory are taken on the settings' device, unless that is meta.
    Raises: ValueError for an unknown model.
    """
    architecture = architecture or find_architecture(name)
    rows: list[Row] = []
    denoiser = None
    for batch in batches:
        measured = _count(architecture, batch, settings)
        if settings.device.type != "meta":
            bench = _workbench(architecture, batch, settings, settings.device, denoiser=denoiser)
            denoiser = bench.denoiser
            _time(bench, measured, settings)
        card = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else ""
        rows += rows_of(measured, model=name, batch=batch, steps=settings.steps, dtype=settings.dtype, device=card)
    return rows


def _count(architecture: Architecture, batch: int, settings: Settings) -> dict[str, Measured]:
    bench = _workbench(architecture, batch, settings, torch.device("meta"), counted=True)
    counted = {COUNTED_AS.get(name, name): Measured() for name in settings.arms}
    for name, one in counted.items():
        attempt(one, partial(_count_arm, bench, name))
        one.failed = False  # it may run all the same
    measured = {name: replace(counted[COUNTED_AS.get(name, name)]) for name in settings.arms}
    if "cfg_compiled" in measured:
        measured["cfg_compiled"].launches = None
    return measured


def _count_arm(bench: Workbench, name: str, one: Measured) -> None:
    arm = bench.arm(name)
    counts = bench.count(arm)
    one.flops, one.launches = counts.flops, counts.launches.total()
    _describe(arm, bench, one)


def _time(bench: Workbench, measured: dict[str, Measured], settings: Settings) -> None:
    runs: dict[str, Run] = {}
    for name, one in measured.items():
        if reason := untimed(name, bench.device):
            one.note = "; ".join(filter(None, [one.note, reason]))
        else:
            attempt(one, partial(_make_run, bench, name, runs))
    time_runs(runs, measured, settings.rounds, bench.device)


def _make_run(bench: Workbench, name: str, runs: dict[str, Run], one: Measured) -> None:
    """Make an arm and run it until all of it is compiled and captured; its memory, as if only it and the base were there."""
    cuda = bench.device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        others = torch.cuda.memory_allocated(bench.device) - weight_bytes(bench.denoiser)
    arm = bench.arm(name)
    run = partial(bench.run, arm)
    run()
    run()
    _describe(arm, bench, one)
    if cuda:
        torch.cuda.synchronize(bench.device)
        one.peak_memory = torch.cuda.max_memory_allocated(bench.device) - others
        one.launches = kernels(run)
    runs[name] = run


def _describe(arm: Arm, bench: Workbench, one: Measured) -> None:
    """What is known of an arm that was run."""
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
        **options,
    )
