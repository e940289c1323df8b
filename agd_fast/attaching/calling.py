"""One call of a pipeline whose denoisers carry adapters: one forward a step at the caller's guidance scale."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from agd_fast.adapters import AdapterConfig
from agd_fast.attaching.arming import TOLERANCE, armed, disabled, to_omega, warn_outside
from agd_fast.attaching.attachment import attachment_of, require_attachment
from agd_fast.attaching.find import components_of, uncompiled
from agd_fast.attaching.scope import Guidance, optimized, scope_of, scoped
from agd_fast.attaching.steps import around_step, before_forward, number_of_steps
from agd_fast.attaching.timesteps import position_of
from agd_fast.spec import DenoiserSpec, device_of
from agd_fast.warning import warn

Negative = Literal["warn", "cfg"]
Interval = tuple[float, float]
Scale = Tensor | Callable[[float], Tensor]  # ω [B], or [1] for all; or that at a fraction of the schedule

_ROWS = ("prompt", "class_labels", "prompt_embeds", "prompt_embeds_qwen", "prompt_embeds_t5")
_OF_THE_RULE = ("guidance_rescale", "guess_mode", "skip_guidance_layers", "use_dynamic_cfg", "cfg_trunc_ratio")
_REPEATS = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def call_pipeline(
    pipe: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    guidance_interval: Interval | None = None,
    negative: Negative = "warn",
) -> Any:
    """`call(*args, **kwargs)`, the pipeline's own, with its adapters armed and its own guidance off.

    The guidance scale is one number, one a prompt, or a function of the fraction of the steps that is done (0 ≤ · < 1), which
    gives either. guidance_interval: the (start, stop) fractions of the steps in which the adapters act, as in diffusers' guiders.
    negative: what to do with a negative prompt, which adapters do not know: "warn" that it is left out, or "cfg": two passes by
    the base, for this call.
    Raises: ValueError for scales that do not go with the prompts; RuntimeError when the pipeline calls a denoiser twice a step.
    """
    watched = any(kwargs.get(name) is not None for name in ("callback_on_step_end", "callback"))
    with scoped(pipe, lambda: pipe.scheduler.timesteps, watched=watched), _counting_versions(pipe):
        vars(pipe).pop("_num_timesteps", None)  # of the last call
        return _call(pipe, call, args, kwargs, guidance_interval, negative)


def _call(
    pipe: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guidance_interval: Interval | None,
    negative: Negative,
) -> Any:
    if negative not in get_args(Negative):
        raise ValueError(f"negative must be one of {', '.join(map(repr, get_args(Negative)))}; found {negative!r}")
    first = attachment_of(pipe)
    if first is None or not first.enabled:
        return call(*args, **kwargs)
    spec, parameters = first.spec, inspect.signature(call).parameters
    arguments = {**inspect.signature(call).bind(*args, **kwargs).arguments}
    arguments |= arguments.pop("kwargs", {})
    empty = None if spec.pipeline.own_negative else ""
    if _has_negative(arguments, (None, empty, spec.pipeline.negative_prompt, first.adapter.config.negative_prompt)):
        if negative == "cfg":
            return _two_pass(pipe, call, arguments, spec)
        warn(
            "the negative prompt is left out: this adapter was trained for the unconditional prediction; "
            "negative='cfg' runs the base with two passes instead",
        )
    if others := sorted(name for name in _OF_THE_RULE if arguments.get(name)):
        warn(
            f"without effect: {', '.join(others)}. It belongs to the pipeline's own guidance, which one pass has as it was "
            "distilled (agd_fast.distill(..., call=...))",
        )
    if first.omega is not None:
        return _call_inside_guided(pipe, call, arguments, spec, guidance_interval)
    omegas = _omegas(pipe, arguments, parameters, spec)
    if all(not callable(omega) and (omega == 1).all() for omega in omegas.values()):
        with disabled(pipe):
            return call(**_without_guidance(arguments, spec))
    with ExitStack() as stack:
        _arm(stack, pipe, omegas, spec, guidance_interval)
        return call(**_without_guidance(_positive_images(arguments, parameters), spec))


def _call_inside_guided(
    pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], spec: DenoiserSpec, interval: Interval | None
) -> Any:
    """A call inside `agd_fast.guided`, which has decided ω. Raises: ValueError when the call has a guidance scale too."""
    name, off = spec.pipeline.omega_arguments[0], spec.pipeline.cfg_off_value
    if arguments.get(name, off) != off:
        raise ValueError(
            f"agd_fast.guided(...) decides the guidance scale of this call; expected {name} left out or {off:g}, "
            f"found {arguments[name]} (double guidance)"
        )
    if name not in arguments:
        arguments = _positive_images(arguments, inspect.signature(call).parameters)
    omegas: dict[str, Scale] = {}
    for component, module in components_of(pipe, spec).items():
        omega = require_attachment(module).omega
        assert omega is not None
        omegas[component] = omega
    with ExitStack() as stack:
        _arm(stack, pipe, omegas, spec, interval)
        return call(**_without_guidance(arguments, spec))


def _omegas(
    pipe: Any, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], spec: DenoiserSpec
) -> dict[str, Scale]:
    """ω of each denoiser."""
    found: dict[str, Scale] = {}
    value: Any = None
    for index, (name, module) in enumerate(components_of(pipe, spec).items()):
        argument = spec.pipeline.omega_arguments[min(index, len(spec.pipeline.omega_arguments) - 1)]
        default = parameters[argument].default if argument in parameters else None
        given = arguments.get(argument, default)
        value = value if given is None else given  # a second denoiser goes by the first's
        if value is None:
            raise ValueError(f"expected {argument}=..., a number or one a prompt; found None")
        rows = partial(_rows, argument, spec, require_attachment(module).adapter.config, _batch(arguments))
        found[name] = partial(_scheduled, value, rows) if callable(value) else rows(value)
    return found


def _scheduled(schedule: Callable[[float], Any], rows: Callable[[Any], Tensor], fraction: float) -> Tensor:
    return rows(schedule(fraction))


def _rows(argument: str, spec: DenoiserSpec, config: AdapterConfig, batch: tuple[int | None, int], scale: Any) -> Tensor:
    """ω [B] of a guidance scale where the call tells B, else [1]; 1 where no pipeline guides and the adapter did not learn to."""
    (low, _), above = config.guidance_range, spec.guides_above
    omega, (prompts, repeats) = to_omega(scale, spec), batch
    omega = omega.where(omega >= low - TOLERANCE if low < above else omega > above, 1.0)  # a guider may teach what none do
    if len(omega) > 1 and len(omega) != prompts:
        raise ValueError(
            f"{argument} has {len(omega)} values for {prompts if prompts else 'an unknown number of'} prompt(s); "
            "expected one number, or a list with one a prompt beside a list of prompts"
        )
    return omega if prompts is None else omega.expand(prompts).repeat_interleave(repeats)


def _batch(arguments: Mapping[str, Any]) -> tuple[int | None, int]:
    """Number of prompts, where the call tells it, and of samples a prompt."""
    repeats = next((arguments[name] for name in _REPEATS if arguments.get(name)), 1)
    for name in _ROWS:
        value = arguments.get(name)
        if isinstance(value, (str, int)):
            return 1, repeats
        if isinstance(value, (list, tuple, Tensor)):
            return len(value), repeats
    return None, repeats


def _arm(stack: ExitStack, pipe: Any, omegas: Mapping[str, Scale], spec: DenoiserSpec, interval: Interval | None) -> None:
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval must be (start, stop), fractions with 0 ≤ start < stop ≤ 1; found {interval}")
    components = components_of(pipe, spec)
    placed: list[_Placed] = []
    for name, component in components.items():
        scale = omegas[name]
        omega = scale(0.0) if callable(scale) else scale
        placed.append(_Placed(component, scale))
        if not callable(scale):
            warn_outside(omega, placed[-1].attachment.adapter.config)
        stack.enter_context(armed(placed[-1].attachment, omega.to(device_of(component))))
    steps = _Steps(pipe, placed, interval)
    for component in components.values():
        stack.enter_context(before_forward(component, steps.forward))
    stack.enter_context(around_step(pipe.scheduler, steps.step))


class _Placed:
    """An armed denoiser and its ω."""

    def __init__(self, component: nn.Module, scale: Scale) -> None:
        self.component, self.scale = component, scale
        self.attachment = require_attachment(component)
        self.guidance: Guidance | None = None

    def plan(self, first: int, fractions: list[float], gates: list[float]) -> None:
        """Lay out ω and the adapter's factor for all steps. first: the scheduler's timestep that the first of them is at."""
        scale = self.scale
        rows = [scale(fraction) for fraction in fractions] if callable(scale) else [scale] * len(fractions)
        omegas = torch.stack(rows)
        if callable(scale):
            warn_outside(omegas, self.attachment.adapter.config)
        device = device_of(self.component)
        numbers = torch.arange(len(omegas), dtype=torch.float32)
        self.guidance = Guidance(omegas.to(device), torch.tensor(gates).to(device), numbers.to(device), first)
        if (scope := scope_of(uncompiled(self.component))) is not None:
            scope.guidance = self.guidance

    def at(self, step: int, acts: bool) -> None:
        assert self.guidance is not None
        self.guidance.step = step
        self.attachment.omega = self.guidance.omegas[step] if acts else None


class _Steps:
    """Guards that there is one forward a step, and sets what changes from step to step: ω, and whether the adapters act."""

    def __init__(self, pipe: Any, placed: list[_Placed], interval: Interval | None) -> None:
        self.pipe, self.placed, self.interval = pipe, placed, interval
        self.varies = interval is not None or any(callable(one.scale) for one in placed)
        self.firsts: list[int] = []  # of each step, the first one at the same timestep
        self.acts: list[bool] = []
        self.done, self.called = 0, False

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.called:
            raise RuntimeError(
                "the pipeline called a denoiser twice in one step while its adapter was armed (double guidance); expected one "
                "forward a step: this pipeline needs agd_fast.disabled(pipe), or guides in a way that adapters do not know"
            )
        self.called = True
        if self.varies:
            if not self.firsts:
                self._plan(args, kwargs)
            step = self.firsts[min(self.done, len(self.firsts) - 1)]
            for one in self.placed:
                one.at(step, self.acts[step])

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        total, times = number_of_steps(self.pipe), self.pipe.scheduler.timesteps
        attachment = self.placed[0].attachment
        first = position_of(times, attachment.spec, torch.as_tensor(attachment.argument(attachment.spec.timestep, args, kwargs)))
        first = len(times) - total if first is None else first  # as image-to-image does it, which makes the last steps
        times = times[first : first + total].tolist()
        self.firsts = [times.index(time) for time in times]
        total = len(times)
        start, stop = self.interval or (0.0, 1.0)
        self.acts = [int(start * total) <= step < int(stop * total) for step in range(total)]
        for one in self.placed:
            one.plan(first, [same / total for same in self.firsts], [float(self.acts[same]) for same in self.firsts])

    def step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.called = False
        self.done += 1
        return step(*args, **kwargs)


def _counting_versions(pipe: Any) -> AbstractContextManager[Any]:
    """For the engine, which must see when a tensor is written to: inference tensors do not tell."""
    return torch.inference_mode(False) if optimized(pipe) and torch.is_inference_mode_enabled() else nullcontext()


def _has_negative(arguments: Mapping[str, Any], known: tuple[str | None, ...]) -> bool:
    """Whether the call has a negative prompt that the adapter was not trained for."""
    for name, value in arguments.items():
        if name.startswith("negative_prompt"):
            values = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(one, Tensor) or one not in known for one in values):
                return True
    return False


def _without_guidance(arguments: Mapping[str, Any], spec: DenoiserSpec) -> dict[str, Any]:
    kept = {name: value for name, value in arguments.items() if not name.startswith("negative_")}
    first, *others = spec.pipeline.omega_arguments
    off = dict.fromkeys([first, *(name for name in others if kept.get(name) is not None)], spec.pipeline.cfg_off_value)
    return {**kept, **off}


def _positive_images(arguments: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """IP-Adapter's embeddings, which pipelines take as [negative, positive] where they guide, without the negative half."""
    name = "ip_adapter_image_embeds"
    embeddings = arguments.get(name)
    if embeddings is None or f"negative_{name}" in parameters:
        return arguments
    if isinstance(embeddings, Tensor):
        return {**arguments, name: _second_half(embeddings)}
    return {**arguments, name: [_second_half(one) for one in embeddings]}


def _second_half(both: Tensor) -> Tensor:
    """Of what has two halves."""
    return both if len(both) % 2 else both[len(both) // 2 :]


def _two_pass(pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], spec: DenoiserSpec) -> Any:
    for name in spec.pipeline.omega_arguments:
        if arguments.get(name) is None:
            continue
        if callable(arguments[name]):
            raise ValueError(
                f"negative='cfg' runs the pipeline's own guidance, which takes one {name}; found a function of the step"
            )
        scales = torch.as_tensor(arguments[name]).flatten()
        if len(scales.unique()) > 1:
            raise ValueError(f"negative='cfg' runs the pipeline's own guidance, which takes one {name}; found {scales.tolist()}")
        arguments[name] = float(scales[0])
    with disabled(pipe):
        return call(**arguments)
