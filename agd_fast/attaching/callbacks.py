"""Callbacks of a call with adapters, which read and write the pipeline's guidance scale as they do without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

_CALLBACKS = ("callback_on_step_end", "callback")


def has_callbacks(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in _CALLBACKS)


def with_scales(
    arguments: Mapping[str, Any], pipe: Any, read: Callable[[], dict[str, Any]], write: Callable[[str, Any], None]
) -> dict[str, Any]:
    """A call's arguments, whose callbacks see `read()`, by the argument's name, as the scales that the pipeline goes by
    (`_guidance_scale`); what they put there goes to `write(name, value)`, and the pipeline's guidance stays off."""
    found = dict(arguments)
    for name in _CALLBACKS:
        callback = arguments.get(name)
        if callback is None:
            continue
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):  # which the pipeline asks
            found["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        found[name] = partial(_with_scales, pipe, read, write, partial(_whole, callback))
    return found


def _with_scales(
    pipe: Any, read: Callable[[], dict[str, Any]], write: Callable[[str, Any], None], callback: Callable[..., Any], *args: Any
) -> Any:
    seen = {name: value for name, value in read().items() if f"_{name}" in vars(pipe)}
    off = {f"_{name}": vars(pipe)[f"_{name}"] for name in seen}
    vars(pipe).update({f"_{name}": value for name, value in seen.items()})
    try:
        output = callback(*args)
    finally:
        left = {name: vars(pipe)[f"_{name}"] for name in seen}
        vars(pipe).update(off)
    for name, value in left.items():
        if value is not seen[name]:
            write(name, value)
    return output


def _whole(callback: Callable[..., Any], *args: Any) -> Any:
    """Of what a callback is handed and cuts to its conditional half, all: there is no other half in one pass."""
    handed = dict(args[3]) if len(args) > 3 else {}
    output = callback(*args)
    for name, value in handed.items():
        if name != "latents" and isinstance(output, dict) and 0 < _count(output.get(name)) < _count(value):
            output[name] = value
    return output


def _count(value: Any) -> int:
    """Of rows."""
    if isinstance(value, Tensor):
        return len(value) if value.ndim else 0
    return len(value) if isinstance(value, (list, tuple)) else 0
