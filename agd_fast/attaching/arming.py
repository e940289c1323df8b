"""Arming an adapter with ω, and switching it off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from agd_fast.adapters import AdapterConfig
from agd_fast.adapters.base import Ahead
from agd_fast.attaching.attachment import Attachment, attachments_of, require_attachment
from agd_fast.attaching.calls import refuse_other_threads
from agd_fast.attaching.find import components_of, uncompiled
from agd_fast.attaching.scope import Scope, in_scope, scope_of
from agd_fast.forward import device_of
from agd_fast.spec import DenoiserSpec
from agd_fast.warning import warn

GuidanceScale = float | Sequence[float] | Tensor
TOLERANCE = 1e-6  # of ω, at the ends of a range


@contextmanager
def guided(model: Any, guidance_scale: GuidanceScale) -> Iterator[None]:
    """Arm the adapter: inside this context, every forward pass predicts the guided result.

    guidance_scale: one number, or one per sample [B], in the model family's own convention. With a single number, a doubled CFG
        batch cannot be told from a plain one: call the denoiser directly, or a pipeline with its own guidance off.
    Raises: ValueError if no adapter is attached, or if modules that it acts on were replaced since; RuntimeError while a call of
    a pipeline with this denoiser is running in another thread. Warns: if ω lies outside the trained range.
    """
    spec = require_attachment(model).spec
    omega = to_omega(guidance_scale, spec)
    attachments = {component: require_attachment(component) for component in components_of(model, spec).values()}
    with ExitStack() as stack:
        with refuse_other_threads([*attachments.values()], "guided"):
            for component, attachment in attachments.items():
                attachment.require_sites(uncompiled(component))
                warn_outside(omega, attachment.adapter.config)
                stack.enter_context(armed(attachment, omega.to(device_of(component))))
        for component in attachments:
            if scope_of(uncompiled(component)) is None:
                stack.enter_context(in_scope(component, Scope()))
        yield


@contextmanager
def armed(
    attachment: Attachment, omega: Tensor | None, gate: Tensor | None = None, *, ahead: Ahead | None = None
) -> Iterator[None]:
    """Arm with ω [1] or [B] as given, or disarm with None: no conversion, no check, no host sync.

    gate: [1], a factor on all that the adapter contributes. ahead: see `Context`.
    """
    previous = attachment.omega, attachment.gate, attachment.ahead
    attachment.omega, attachment.gate, attachment.ahead = omega, gate, ahead
    try:
        yield
    finally:
        attachment.omega, attachment.gate, attachment.ahead = previous


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """Run the base inside this context, whatever is attached or armed. A pipeline then makes its own two-pass guidance.

    The result is bit-exact, or exact up to rounding while the engine (`optimize`) is on, which runs the base too.
    Raises: RuntimeError while a call of a pipeline with this denoiser is running in another thread.
    """
    attachments = attachments_of(model)
    with refuse_other_threads(attachments, "disabled"):
        previous = [attachment.enabled for attachment in attachments]
        for attachment in attachments:
            attachment.enabled = False
    try:
        yield
    finally:
        for attachment, enabled in zip(attachments, previous, strict=True):
            attachment.enabled = enabled


def to_omega(guidance_scale: GuidanceScale, spec: DenoiserSpec) -> Tensor:
    """ω in the standard convention (ω = 1: no guidance), [1] or [B] float32. Raises: TypeError, ValueError for other values."""
    expected = "expected one finite guidance scale or one a sample [B]"
    try:
        scale = torch.as_tensor(guidance_scale, dtype=torch.float32).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{expected}, found {guidance_scale!r}") from error
    if scale.ndim > 1 or not scale.numel() or not torch.isfinite(scale).all():
        raise ValueError(f"{expected}, found shape {tuple(scale.shape)}: {scale.tolist()}")
    return scale.reshape(-1) + spec.omega_offset


def warn_outside(omega: Tensor, config: AdapterConfig) -> None:
    low, high = config.guidance_range
    outside = (omega < low - TOLERANCE) | (omega > high + TOLERANCE)
    if config.identity_at_one:
        outside &= omega != 1
    if outside.any():
        lowest, highest = float(omega.min()), float(omega.max())
        warn(
            f"guidance scale ω from {lowest:g} to {highest:g} lies outside [{low:g}, {high:g}], "
            "the range this adapter was trained on; far outside, samples break: distil with a wider guidance_range",
        )
