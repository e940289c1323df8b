"""An adapter as a guider of Modular Diffusers: one condition, one forward pass per step."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from agd_fast.attaching import require_attachment, to_omega, uncompiled, warn_outside
from agd_fast.forward import device_of


class AdapterGuidance(BaseGuidance):
    """Guider that arms the denoiser's adapter for its one forward pass per step.

    guidance_scale: one number or one per sample, in the model family's own convention.
    start, stop: fractions of the steps between which the adapter acts.
    enabled: False leaves the plain conditional prediction.
    Raises: ValueError at the first step if the denoiser has no adapter, or if modules that it acts on were replaced since.
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012 (diffusers asks for a list)

    @register_to_config
    def __init__(
        self, guidance_scale: float | list[float] = 7.5, start: float = 0.0, stop: float = 1.0, enabled: bool = True
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self._previous: Tensor | None = None

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._acts():
            attachment = require_attachment(denoiser)
            omega = to_omega(self.guidance_scale, attachment.spec)
            if self._step in (None, int(self._start * (self._num_inference_steps or 0))):
                attachment.require_sites(uncompiled(denoiser))
                warn_outside(omega, attachment.adapter.config)
            self._previous, attachment.omega = attachment.omega, omega.to(device_of(denoiser))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        if self._acts():
            require_attachment(denoiser).omega = self._previous

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def forward(self, pred_cond: torch.Tensor) -> GuiderOutput:
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        return True

    @property
    def num_conditions(self) -> int:
        return 1

    def _acts(self) -> bool:
        if not self._enabled:
            return False
        steps = self._num_inference_steps
        return steps is None or int(self._start * steps) <= self._step < int(self._stop * steps)
