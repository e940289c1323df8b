"""A guider of diffusers as the rule that an adapter learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from agd_fast.guiders.adapter_guidance import AdapterGuidance

_APART_AT_ONE = ("zero_init_steps", "adaptive_projected_guidance_scale")


def require_teachable(guider: Any) -> None:
    """Raises: TypeError if it is not a guider; ValueError if its prediction is not a function of (x_t, t, c, ω)."""
    if not isinstance(guider, BaseGuidance):
        raise TypeError(f"expected a guider of diffusers.guiders as the teacher, found {type(guider).__name__}")
    name = type(guider).__name__
    if isinstance(guider, AdapterGuidance):
        raise ValueError(
            "an adapter cannot teach itself; expected a guider such as ClassifierFreeGuidance, found AdapterGuidance"
        )
    if not guider._enabled:
        raise ValueError(f"{name} is switched off, and guides by no scale; expected {name}(enabled=True)")
    for setting in ("adaptive_projected_guidance_momentum", "momentum"):
        if (value := getattr(guider, setting, None)) is not None:
            raise ValueError(
                f"{name} with {setting}={value} adds up earlier steps, which an adapter does not see; expected {setting}=None, "
                "or another guider, such as ClassifierFreeGuidance"
            )
    if hasattr(guider, "modality_scale"):
        raise ValueError(
            f"{name} guides x0 by passes that LTX-2's own blocks change, which no pipeline here does; expected another guider, "
            "such as ClassifierFreeGuidance"
        )
    for setting in ("auto_guidance_config", "skip_layer_config"):
        for layers in getattr(guider, setting, None) or ():
            if 0 < layers.dropout < 1:
                raise ValueError(
                    f"{name} drops a part of its layers at random (dropout={layers.dropout}), which an adapter cannot learn; "
                    "expected dropout=1.0"
                )
    if not isinstance(getattr(guider, "guidance_scale", None), (int, float)):
        raise ValueError(f"{name} has no single guidance_scale for an adapter to be trained over; expected a guider with one")


def name_of_guider(guider: BaseGuidance) -> str:
    """Its class and settings without the guidance scale, which varies."""
    settings = {n: v for n, v in sorted(guider.config.items()) if not n.startswith("_") and n != "guidance_scale"}
    return f"{type(guider).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def gives_cond_at_one(guider: BaseGuidance) -> bool:
    """Whether the rule goes to ε(c) as ω goes to 1.

    It does not if a further branch has a scale of its own, if the first steps give zero, or if the difference Δ of both branches
    is clipped or projected before it is added to ε(∅), as in APG. In that case, the original formulation does: it adds
    g·Δ to ε(c), and g goes to 0.
    """
    if len(guider._input_predictions or ()) > 2 or any(getattr(guider, setting, 0) for setting in _APART_AT_ONE):
        return False
    changed = getattr(guider, "adaptive_projected_guidance_rescale", 0) or getattr(guider, "eta", 1.0) != 1
    return not changed or bool(getattr(guider, "use_original_formulation", False))


def scale_for(guider: BaseGuidance, omega: float) -> float:
    """The guider's scale for ω in the standard convention; its original formulation writes cond + g·(cond − uncond)."""
    return omega - 1 if getattr(guider, "use_original_formulation", False) else omega


def guided_by(
    guider: BaseGuidance,
    denoiser: nn.Module,
    predict: Callable[[Any], Tensor],
    calls: Mapping[str, Any],
    omega: float,
    *,
    step: int,
    steps: int,
    timestep: Tensor,
) -> Tensor:
    """The guider's prediction at one step.

    predict: one forward with the arguments of `calls`, which holds those of the conditional ("cond") and of the unconditional
    call ("uncond"). The guider is left as it was, except for its state of the step.
    """
    previous, guider.guidance_scale = guider.guidance_scale, scale_for(guider, omega)
    try:
        guider.set_state(step=step, num_inference_steps=steps, timestep=timestep)
        batches = guider.prepare_inputs({"call": (calls["cond"], calls["uncond"])})
        for batch in batches:
            guider.prepare_models(denoiser)
            try:
                batch.noise_pred = predict(batch.call)
            finally:
                guider.cleanup_models(denoiser)
        return guider(batches)[0]
    finally:
        guider.guidance_scale = previous
