"""Forwards of a few samples at a time, if one of all would not fit: the conditional and the unconditional one of guidance run
one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.attaching import armed, attachment_of
from agd_fast.attaching.find import uncompiled
from agd_fast.forward import forward_parameters
from agd_fast.spec import DenoiserSpec


@contextmanager
def few_at_once(component: nn.Module, spec: DenoiserSpec, size: int) -> Iterator[None]:
    """Inside, forwards without gradients of more than `size` samples are run in parts of `size`; whatever observes the denoiser's
    calls still sees whole ones. A compiled denoiser is left alone: it was compiled for the batches that it is called with."""
    if component is not uncompiled(component) or component._compiled_call_impl is not None:
        yield
        return
    parameters = forward_parameters(component)

    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(parameters, args, strict=False)), **kwargs}
        count = len(arguments[spec.sample])
        if torch.is_grad_enabled() or count <= size:
            return component._call_impl(*args, **kwargs)
        outputs = []
        for start in range(0, count, size):
            here = slice(start, min(start + size, count))
            part = {name: _part(name, value, spec, count, here) for name, value in arguments.items()}
            with _armed_for(component, count, here):
                outputs.append(component._call_impl(**part))
        return _joined(outputs)

    component._compiled_call_impl = call
    try:
        yield
    finally:
        component._compiled_call_impl = None


def first_few(arguments: Mapping[str, Any], spec: DenoiserSpec, size: int) -> dict[str, Any]:
    """The arguments of a forward of the first `size` samples."""
    count = len(arguments[spec.sample])
    return {name: _part(name, value, spec, count, slice(0, min(size, count))) for name, value in arguments.items()}


def _part(path: str, value: Any, spec: DenoiserSpec, count: int, here: slice) -> Any:
    """The rows `here` of an argument, by (dotted) name, or all of a constant; told apart as the recorder does."""
    if path in (*spec.listed, *spec.repeated):
        return value[here]
    if isinstance(value, Mapping):
        return {key: _part(f"{path}.{key}", inner, spec, count, here) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_part(f"{path}.{index}", inner, spec, count, here) for index, inner in enumerate(value))
    if path in spec.grouped:
        return value.unflatten(0, (count, -1))[here].flatten(0, 1)
    dim = spec.batch_dim(path)
    if not isinstance(value, Tensor) or dim is None or value.ndim <= dim or value.shape[dim] != count:
        return value
    return value.narrow(dim, here.start, here.stop - here.start)


def _armed_for(component: nn.Module, count: int, here: slice) -> Any:
    """The adapter armed with these samples' ω, if it is armed with one per sample."""
    attachment = attachment_of(component)
    if attachment is None or attachment.omega is None or len(attachment.omega) != count:
        return nullcontext()
    return armed(attachment, attachment.omega[here], attachment.gate, ahead=attachment.ahead)


def _joined(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if isinstance(first, Mapping):  # an output class of diffusers
        make: Callable[..., Any] = type(first)
        return make(**{name: _joined([output[name] for output in outputs]) for name in first})
    if isinstance(first, list):  # one tensor per sample
        return [one for output in outputs for one in output]
    if isinstance(first, tuple):
        return tuple(_joined(list(parts)) for parts in zip(*outputs, strict=True))
    return first
