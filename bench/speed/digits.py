"""Measuring the arms on a small teacher with trained weights, by whole sampling runs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.evaluation.evaluate import arm_sampler, count_evaluations
from agd_fast.teacher import Conditions
from speed.arms import (
    ARMS,
    engine_config,
    note_of,
    randomise_zeros,
    reference_config,
    require_arms,
    shared_copy,
    untimed,
    weight_bytes,
)
from speed.counting import counting
from speed.measure import Keep, Measured, Row, Run, attempt, compare, kernels, rows_of, time_runs
from speed.models import Settings

HIDDEN = 16  # width of the reference's adapters on so small a base: about the same share of it as on their own bases


def measure_teacher(teacher: agd.Teacher, table: Conditions, batch: int, settings: Settings, keep: Keep) -> list[Row]:
    """Rows of a teacher, one per arm. table: the conditions to sample, one after another. keep: see `measure_model`.

    Launches are those of uncompiled code, including the scheduler's.
    """
    require_arms(settings.arms)
    rows = torch.arange(batch) % len(next(iter(table.values())))
    conditions = {name: value[rows].to(teacher.device) for name, value in table.items()}
    noise = torch.randn(batch, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    measured = {name: Measured() for name in settings.arms}
    runs: dict[str, Run] = {}
    card = torch.cuda.get_device_name(settings.device) if settings.device.type == "cuda" else ""

    def found() -> list[Row]:
        return rows_of(measured, model=teacher.name, batch=batch, steps=settings.steps, dtype=settings.dtype, device=card)

    for name, one in measured.items():
        attempt(one, partial(_measure_arm, teacher, name, conditions, noise, settings, runs))
        keep(found())
    compare({name: run().float() for name, run in runs.items()}, measured)
    time_runs(runs, measured, settings.rounds, settings.device, lambda: keep(found()))
    return found()


def _measure_arm(
    teacher: agd.Teacher,
    name: str,
    conditions: Conditions,
    noise: Tensor,
    settings: Settings,
    runs: dict[str, Run],
    one: Measured,
) -> None:
    kind = ARMS[name]
    model = _model(teacher, name, settings.kind)
    run = _sampler(model, name, conditions, noise, settings)
    with count_evaluations(model.denoiser) as evaluated:
        run()
    one.nfe = evaluated[0] / len(noise)
    if kind.engine is not None:
        agd.optimize(model, engine_config(kind.engine, counted=True))
        run()  # the run in which the engine captures
    with counting(settings.device.type) as counts:
        run()
    one.flops, one.launches = counts.flops, None if kind.torch_compiled else counts.launches.total()
    attachment = attachment_of(model)
    one.adapter = None if attachment is None else attachment.adapter.config
    one.weight_bytes = weight_bytes(model.denoiser) + (0 if attachment is None else weight_bytes(attachment.adapter))
    if kind.torch_compiled:
        mode = "reduce-overhead" if settings.device.type == "cuda" else None  # with CUDA graphs
        compiled: Any = torch.compile(model.denoiser, fullgraph=True, dynamic=False, mode=mode)
        run = _sampler(replace(model, denoiser=compiled), name, conditions, noise, settings)
    elif kind.engine is not None:
        agd.optimize(model, engine_config(kind.engine))
    if reason := untimed(name, settings.device):
        one.note = reason
        return
    run()
    run()
    one.note = note_of(model.denoiser)
    if settings.device.type == "cuda":
        found = kernels(run)
        one.launches, one.device_seconds = found.launches, found.seconds
    runs[name] = run


def _model(teacher: agd.Teacher, name: str, kind: str | None) -> agd.Teacher:
    """The same weights in modules of their own, with an adapter where the arm has one."""
    model = replace(teacher, denoiser=shared_copy(teacher.denoiser))
    if ARMS[name].method == "agd":
        torch.manual_seed(0)  # so that arms with the same adapter agree
        config = reference_config(kind, HIDDEN) if name == "agd_naive" else agd.AdapterConfig(kind=kind)
        randomise_zeros(agd.attach(model, config))
    return model


def _sampler(model: agd.Teacher, name: str, conditions: Conditions, noise: Tensor, settings: Settings) -> Run:
    return arm_sampler(
        model, ARMS[name].method, None, noise, settings.guidance_scale, settings.steps, len(noise), conditions=conditions
    )
