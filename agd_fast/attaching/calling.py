"""One call of a pipeline whose denoisers have adapters: one forward pass per step at the caller's guidance scale."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from agd_fast.attaching.arming import armed, to_omega
from agd_fast.attaching.attachment import Attachment, attachments_of, require_attachment
from agd_fast.attaching.callbacks import has_callbacks, with_scales
from agd_fast.attaching.calls import alone
from agd_fast.attaching.find import components_of
from agd_fast.attaching.negatives import other_negative
from agd_fast.attaching.scales import scales_inside_guided, scales_of
from agd_fast.attaching.scope import optimized, scoped
from agd_fast.attaching.stepping import Interval, arm
from agd_fast.checking import number_range
from agd_fast.spec import DenoiserSpec
from agd_fast.warning import warn

Negative = Literal["warn", "cfg"]

_OF_THE_RULE = ("guidance_rescale", "guess_mode", "skip_guidance_layers", "use_dynamic_cfg", "cfg_trunc_ratio")


def call_pipeline(
    pipe: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    guidance_interval: Interval | None = None,
    negative: Negative = "warn",
) -> Any:
    """Make the pipeline's own call, `call(*args, **kwargs)`, with its adapters armed and its own guidance off.

    The guidance scale is one number, one per prompt, or a function of the completed fraction of the steps (at least 0, below 1)
    that returns either. A callback may change it.
    guidance_interval: the (start, stop) fractions of the steps between which the adapters act, as in diffusers' guiders.
    negative: what to do with a negative prompt, which adapters do not know. "warn" leaves it out and says so; "cfg" runs this
        call with two passes by the base.
    Raises: ValueError for scales that do not match the prompts, and for a guidance_interval if no adapter acts; RuntimeError if
    the pipeline calls a denoiser twice in a step, and inside another call with the same denoiser, even if that runs the base.
    """
    if negative not in get_args(Negative):
        raise ValueError(f"negative must be one of {', '.join(map(repr, get_args(Negative)))}; found {negative!r}")
    interval = None if guidance_interval is None else number_range("guidance_interval", guidance_interval, within=(0, 1))
    found = attachments_of(pipe)
    timesteps, watched = (lambda: pipe.scheduler.timesteps), has_callbacks(kwargs)
    with alone(found, type(pipe).__name__), scoped(pipe, timesteps, watched=watched, own_times=False), _counting_versions(pipe):
        vars(pipe).pop("_num_timesteps", None)  # left by the last call
        if found and found[0].enabled:
            return _call(pipe, call, args, kwargs, found[0], interval, negative)
        _require_no_interval(interval)
        return call(*args, **kwargs)


def _call(
    pipe: Any,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    first: Attachment,
    guidance_interval: Interval | None,
    negative: Negative,
) -> Any:
    spec, parameters = first.spec, inspect.signature(call).parameters
    arguments = {**inspect.signature(call).bind(*args, **kwargs).arguments}
    arguments |= arguments.pop("kwargs", {})
    if unknown := other_negative(pipe, arguments, first):
        if negative == "cfg":
            _require_no_interval(guidance_interval)
            if first.omega is not None:
                arguments = _at_armed_scale(pipe, arguments, spec)
            return _two_pass(pipe, call, arguments, spec)
        warn(f"the negative prompt is left out: {unknown}; negative='cfg' runs the base with two passes instead")
    if others := sorted(name for name in _OF_THE_RULE if arguments.get(name)):
        warn(
            f"without effect: {', '.join(others)}. It belongs to the pipeline's own guidance, which one pass has as it was "
            "distilled (agd_fast.distill(..., call=...))",
        )
    if first.omega is not None:
        scales = scales_inside_guided(pipe, arguments, spec)
        guides = spec.pipeline.omega_arguments[0] not in arguments
    else:
        scales = scales_of(pipe, arguments, parameters, spec)
        guides = not all(one.is_off for one in scales.values())
        if not guides and not has_callbacks(arguments):
            return call(**_without_guidance(arguments, parameters, spec))
    if guides:
        arguments = _positive_images(arguments, parameters)
    with ExitStack() as stack:
        steps = arm(stack, pipe, scales, spec, guidance_interval)
        arguments = with_scales(arguments, pipe, spec.pipeline.omega_arguments, steps.change)
        return call(**_without_guidance(arguments, parameters, spec))


def _require_no_interval(interval: Interval | None) -> None:
    if interval is not None:
        raise ValueError(
            "guidance_interval says when an adapter acts, and in this call none does (it is disabled, unloaded, or "
            "negative='cfg'): the pipeline's own two passes guide at every step; expected no guidance_interval, found "
            f"{interval}"
        )


def _counting_versions(pipe: Any) -> AbstractContextManager[Any]:
    """No inference mode for the engine, which must see when a tensor is written to: inference tensors have no version counter."""
    return torch.inference_mode(False) if optimized(pipe) and torch.is_inference_mode_enabled() else nullcontext()


def without_negatives(arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """A call's arguments without those of the unconditional prediction that it does not require."""

    def needed(name: str) -> bool:
        return name in parameters and parameters[name].default is inspect.Parameter.empty

    return {name: value for name, value in arguments.items() if not name.startswith("negative_") or needed(name)}


def _without_guidance(
    arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], spec: DenoiserSpec
) -> dict[str, Any]:
    kept = without_negatives(arguments, parameters)
    first, *others = spec.pipeline.omega_arguments
    off = dict.fromkeys([first, *(name for name in others if kept.get(name) is not None)], spec.pipeline.cfg_off_value)
    return {**kept, **off}


def _positive_images(arguments: dict[str, Any], parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Take the negative half off IP-Adapter's embeddings, which pipelines expect as [negative, positive] when they guide."""
    name = "ip_adapter_image_embeds"
    embeddings = arguments.get(name)
    if embeddings is None or f"negative_{name}" in parameters:
        return arguments
    if isinstance(embeddings, Tensor):
        return {**arguments, name: _second_half(embeddings)}
    return {**arguments, name: [_second_half(one) for one in embeddings]}


def _second_half(both: Tensor) -> Tensor:
    """The second half of an even number of rows; else all of them."""
    return both if len(both) % 2 else both[len(both) // 2 :]


def _at_armed_scale(pipe: Any, arguments: Mapping[str, Any], spec: DenoiserSpec) -> dict[str, Any]:
    """A call's arguments with the scale of the `guided` around it. Raises: ValueError if the call sets a scale too."""
    scale = next(iter(scales_inside_guided(pipe, arguments, spec).values())).value
    others = {name: value for name, value in arguments.items() if name not in spec.pipeline.omega_arguments}
    return {**others, spec.pipeline.omega_arguments[0]: scale}


def _two_pass(pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], spec: DenoiserSpec) -> Any:
    for name in spec.pipeline.omega_arguments:
        if arguments.get(name) is None:
            continue
        if callable(arguments[name]):
            raise ValueError(
                f"negative='cfg' runs the pipeline's own guidance, which takes one {name}; found a function of the step"
            )
        to_omega(arguments[name], spec)  # or raises
        scales = torch.as_tensor(arguments[name]).flatten()
        if len(scales.unique()) > 1:
            raise ValueError(f"negative='cfg' runs the pipeline's own guidance, which takes one {name}; found {scales.tolist()}")
        arguments[name] = float(scales[0])
    with ExitStack() as stack:
        for component in components_of(pipe, spec).values():
            stack.enter_context(armed(require_attachment(component), None))
        return call(**arguments)
