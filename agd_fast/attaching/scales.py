"""The guidance scales of a call as its caller gave them, and the ω that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter
from typing import Any

from torch import Tensor

from agd_fast.adapters import AdapterConfig
from agd_fast.attaching.arming import TOLERANCE, to_omega
from agd_fast.attaching.attachment import require_attachment
from agd_fast.attaching.find import components_of
from agd_fast.spec import DenoiserSpec

_ROWS = ("prompt", "class_labels", "prompt_embeds", "prompt_embeds_qwen", "prompt_embeds_t5", "image_embeds")
REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass(frozen=True)
class Given:
    """The guidance scale of one denoiser.

    argument: name of the call's argument that it comes from. value: one number, one per prompt, or a function of the completed
    fraction of the steps that returns either. rows: maps such numbers to ω, [B] if the call tells B, else [1] for all.
    """

    argument: str
    value: Any
    rows: Callable[[Any], Tensor]

    @property
    def varies(self) -> bool:
        return callable(self.value)

    @property
    def is_off(self) -> bool:
        """Whether it means no guidance, at all steps."""
        return not self.varies and bool((self.omega() == 1).all())

    def at(self, fraction: float) -> Any:
        return self.value(fraction) if self.varies else self.value

    def omega(self, fraction: float = 0.0) -> Tensor:
        return self.rows(self.at(fraction))


def scales_of(
    pipe: Any, arguments: Mapping[str, Any], parameters: Mapping[str, Parameter], spec: DenoiserSpec
) -> dict[str, Given]:
    """Each denoiser's scale. If the first is off, all are, as without adapters. Raises: ValueError if a call has no scale."""
    found: dict[str, Given] = {}
    value: Any = None
    for index, (name, module) in enumerate(components_of(pipe, spec).items()):
        argument = spec.pipeline.omega_arguments[min(index, len(spec.pipeline.omega_arguments) - 1)]
        default = parameters[argument].default if argument in parameters else None
        given = arguments.get(argument, default)
        value = value if given is None else given  # a second denoiser without one takes the first's
        if value is None:
            raise ValueError(f"expected {argument}=..., a number or one a prompt; found None")
        rows = partial(_rows, argument, spec, require_attachment(module).adapter.config, _batch(arguments))
        found[name] = Given(argument, value, rows)
    first = next(iter(found.values()))
    return {name: replace(one, value=first.value) for name, one in found.items()} if first.is_off else found


def scales_inside_guided(pipe: Any, arguments: Mapping[str, Any], spec: DenoiserSpec) -> dict[str, Given]:
    """The scales inside `agd_fast.guided`, which decides ω. Raises: ValueError if the call sets a scale too."""
    name, off = spec.pipeline.omega_arguments[0], spec.pipeline.cfg_off_value
    given = arguments.get(name, off)
    if not isinstance(given, (int, float)) or given != off:
        raise _decided(name, f"left out or {off:g}", given)
    found: dict[str, Given] = {}
    for component, module in components_of(pipe, spec).items():
        omega = require_attachment(module).omega
        assert omega is not None
        scale = omega - spec.omega_offset
        found[component] = Given(name, scale, partial(_only, name, scale, omega))
    return found


def _only(argument: str, scale: Tensor, omega: Tensor, value: Any) -> Tensor:
    if value is not scale:
        raise _decided(argument, "left alone by callbacks", value)
    return omega


def _decided(argument: str, expected: str, found: Any) -> ValueError:
    return ValueError(
        f"agd_fast.guided(...) decides the guidance scale of this call; expected {argument} {expected}, "
        f"found {found} (double guidance)"
    )


def _rows(argument: str, spec: DenoiserSpec, config: AdapterConfig, batch: tuple[int | None, int], scale: Any) -> Tensor:
    """ω of a guidance scale, [B] if the call tells B, else [1]; 1 where no pipeline guides and the adapter did not learn to."""
    (low, _), above = config.guidance_range, spec.guides_above
    omega, (prompts, repeats) = to_omega(scale, spec), batch
    omega = omega.where(omega >= low - TOLERANCE if low < above else omega > above, 1.0)  # a guider may teach lower scales
    if len(omega) > 1 and len(omega) != prompts:
        raise ValueError(
            f"{argument} has {len(omega)} values for {prompts if prompts else 'an unknown number of'} prompt(s); "
            "expected one number, or a list with one a prompt beside a list of prompts"
        )
    return omega if prompts is None else omega.expand(prompts).repeat_interleave(repeats)


def _batch(arguments: Mapping[str, Any]) -> tuple[int | None, int]:
    """Number of prompts, or None if the call does not tell it, and of samples per prompt."""
    repeats = next((arguments[name] for name in REPEATS if arguments.get(name)), 1)
    for name in _ROWS:
        value = arguments.get(name)
        if isinstance(value, (str, int)):
            return 1, repeats
        if isinstance(value, (list, tuple, Tensor)):
            return len(value), repeats
    return None, repeats
