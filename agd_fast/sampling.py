"""Sampling a denoiser: with its adapter, with two-pass guidance, or without guidance."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from agd_fast.attaching import GuidanceScale, attachment_of, guided, scoped, to_omega
from agd_fast.schedule import Predict, integrate, timesteps_for
from agd_fast.teacher import Conditions, Teacher, as_teacher

Method = Literal["auto", "agd", "cfg", "unguided"]
Data = tuple[Tensor, Tensor]  # samples [M, C, H, W] and the row of each one's condition [M]


def require_data(data: Data, conditions: Conditions, sample_shape: tuple[int, ...]) -> None:
    """Raises: ValueError when data does not fit the model or the table of conditions."""
    (samples, rows), count = data, len(next(iter(conditions.values())))
    if tuple(samples.shape[1:]) != sample_shape or rows.shape != samples.shape[:1]:
        raise ValueError(
            f"expected data of M samples {sample_shape} and the M rows of their conditions, "
            f"found {tuple(samples.shape)} and {tuple(rows.shape)}"
        )
    if not ((rows >= 0) & (rows < count)).all():
        raise ValueError(f"expected condition rows in 0..{count - 1}, found {int(rows.min())}..{int(rows.max())}")


def sample(
    model: Any,
    class_labels: Sequence[int] | Tensor | int | None = None,
    *,
    conditions: Conditions | None = None,
    guidance_scale: GuidanceScale = 4.0,
    steps: int = 25,
    method: Method = "auto",
    noise: Tensor | None = None,
    seed: int | None = None,
    batch_size: int = 64,
    scheduler: Any = None,
    progress: bool = False,
) -> Tensor:
    """Draw samples [N, C, H, W] in the denoiser's own space: images in [−1, 1], or latents for a latent model.

    model: a Teacher, a diffusers pipeline, or a denoiser with `scheduler`.
    class_labels, conditions: one condition per sample, as labels or as tensors by argument name.
    guidance_scale: one number or one per sample, in the model family's own convention.
    method: how each step predicts.
        - "agd": one forward pass with the attached adapter.
        - "cfg": two of the base, combined by the teacher's guidance rule.
        - "unguided": one of the base, whatever the guidance_scale.
        - "auto": the adapter if one is attached and not disabled, else "cfg".
    noise: [N, C, H, W] to start from; None draws it from `seed`.

    Raises: ValueError for a missing condition, lengths that differ, or method="agd" without an adapter.
    """
    if method not in get_args(Method):
        raise ValueError(f"method must be one of {', '.join(map(repr, get_args(Method)))}; found {method!r}")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, found {steps} and {batch_size}")
    teacher = as_teacher(model, scheduler)
    table = teacher.conditions(class_labels, conditions)
    count = len(next(iter(table.values())))
    if method == "auto":
        attachment = attachment_of(teacher)
        method = "agd" if attachment is not None and attachment.enabled else "cfg"
    if method == "agd":
        teacher.require_adapter("method='agd'")
    seed = int(torch.randint(2**31, (1,))) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    if noise is None:
        noise = torch.randn(count, *teacher.sample_shape, generator=generator)
    seeds = torch.randint(2**31, (count,), generator=generator).tolist()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # one per sample: the batch size does not matter
    omega = to_omega(guidance_scale, teacher.spec)
    if noise.shape != (count, *teacher.sample_shape) or len(omega) not in (1, count):
        raise ValueError(
            f"expected noise {(count, *teacher.sample_shape)} and one guidance_scale or {count}, "
            f"found {tuple(noise.shape)} and {len(omega)}"
        )
    omega = omega.expand(count)
    batches = [slice(start, start + batch_size) for start in range(0, count, batch_size)]
    results = []
    times = timesteps_for(teacher.scheduler, steps)
    with tqdm(total=len(batches) * steps, desc="sampling", disable=not progress, leave=False) as bar, torch.no_grad():
        for rows in batches:
            part = teacher.placed({name: value[rows] for name, value in table.items()})
            start = noise[rows].to(teacher.device, teacher.dtype)
            scale = omega[rows].to(teacher.device)
            armed = guided(teacher, scale - teacher.spec.omega_offset) if method == "agd" else nullcontext()
            with scoped(teacher, times, watched=False, own_times=False), armed:
                predict = predictor(teacher, part, scale, method)
                results.append(
                    integrate(teacher.scheduler, start, steps, predict, generator=generators[rows], progress=bar.update)
                )
    return torch.cat(results)


def predictor(teacher: Teacher, conditions: Conditions, omega: Tensor, method: Method) -> Predict:
    """The prediction of one arm at fixed conditions and ω [B]: one forward with whatever is armed, or the base's two for CFG."""
    if method != "agd":
        teacher.refuse_armed()
    if method == "cfg":
        doubled = teacher.doubled(conditions)
        return lambda x, t: teacher.predict_cfg(x, t, conditions, omega, doubled)[0]
    return lambda x, t: teacher.predict(x, t, conditions)
