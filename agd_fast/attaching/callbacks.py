"""Callbacks of a call with adapters: they see the pipeline's guidance off, and a scale that they write takes effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

_CALLBACKS = ("callback_on_step_end", "callback")


def has_callbacks(arguments: Mapping[str, Any]) -> bool:
    return any(arguments.get(name) is not None for name in _CALLBACKS)


def with_scales(
    arguments: Mapping[str, Any], pipe: Any, names: Sequence[str], write: Callable[[str, Any], None]
) -> dict[str, Any]:
    """A call's arguments with wrapped callbacks. These see the pipeline's own scales (`_guidance_scale`, … for `names`) off, as
    they are in one pass; a number that they write there goes to `write(name, value)`, and the pipeline's guidance stays off."""
    found = dict(arguments)
    for name in _CALLBACKS:
        callback = arguments.get(name)
        if callback is None:
            continue
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):  # the pipeline would ask it, not its wrapper
            found["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        found[name] = partial(_with_scales, pipe, names, write, partial(_whole, callback))
    return found


class _Off(float):
    """The scale of a pipeline that does not guide, distinct from the same number written by a callback."""


def _with_scales(
    pipe: Any, names: Sequence[str], write: Callable[[str, Any], None], callback: Callable[..., Any], *args: Any
) -> Any:
    off = {name: vars(pipe)[f"_{name}"] for name in names if vars(pipe).get(f"_{name}") is not None}
    vars(pipe).update({f"_{name}": _Off(value) for name, value in off.items()})
    try:
        output = callback(*args)
    finally:
        left = {name: vars(pipe)[f"_{name}"] for name in off}
        vars(pipe).update({f"_{name}": value for name, value in off.items()})
    for name, value in left.items():
        if not isinstance(value, _Off):
            write(name, value)
    return output


def _whole(callback: Callable[..., Any], *args: Any) -> Any:
    """Call a callback, and give back whole what it cuts to the conditional half: one pass has no other half."""
    handed = dict(args[3]) if len(args) > 3 else {}
    output = callback(*args)
    for name, value in handed.items():
        if name != "latents" and isinstance(output, dict) and _is_part(output.get(name), value):
            output[name] = value
    return output


def _is_part(found: Any, handed: Any) -> bool:
    """Whether `found` is some of the rows of `handed` themselves, not an edit of them."""
    if isinstance(found, Tensor) and isinstance(handed, Tensor):
        same = found.untyped_storage().data_ptr() == handed.untyped_storage().data_ptr()
        return same and found.ndim == handed.ndim > 0 and 0 < len(found) < len(handed)
    if isinstance(found, (list, tuple)) and isinstance(handed, (list, tuple)):
        return 0 < len(found) < len(handed) and {*map(id, found)} <= {*map(id, handed)}
    return False
