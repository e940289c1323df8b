"""A denoiser's forward: where it runs, what it takes, and its arguments by (dotted) name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device that its forward runs on. Between forwards, accelerate's offloading by module leaves parameters on "meta",
    diffusers' group offloading on the CPU."""
    device = next(module.parameters()).device
    if device.type == "cpu":
        for inner in module.modules():
            registry = vars(inner).get("_diffusers_hook")
            if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
                return hook.config.onload_device
    if device.type == "meta":
        for inner in module.modules():
            if (found := getattr(getattr(inner, "_hf_hook", None), "execution_device", None)) is not None:
                return torch.device(found)
    return device


def forward_parameters(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the denoiser's forward parameters, in positional order."""
    return tuple(inspect.signature(denoiser.forward).parameters)


def required_parameters(denoiser: nn.Module) -> frozenset[str]:
    """Names of the denoiser's forward parameters that have no default."""
    parameters = inspect.signature(denoiser.forward).parameters.items()
    return frozenset(name for name, one in parameters if one.default is one.empty)


def argument_of(name: str, parameters: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value of a (dotted) name in a call of a forward with these parameters; None if it is not passed."""
    outer, _, inner = name.partition(".")
    position = parameters.index(outer) if outer in parameters else len(args)
    value = kwargs[outer] if outer in kwargs else args[position] if position < len(args) else None
    return value.get(inner) if inner and value is not None else value


def nest(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the denoiser from values by (dotted) name; inner names that are numbers make a list."""
    arguments: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        outer, _, rest = name.partition(".")
        if rest:
            inner.setdefault(outer, {})[rest] = value
        else:
            arguments[outer] = value
    for outer, found in inner.items():
        nested = nest(found)
        arguments[outer] = [nested[key] for key in sorted(nested, key=int)] if all(map(str.isdigit, nested)) else nested
    return arguments
