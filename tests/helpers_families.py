"""Calls of the tiny pipelines of every family, what happened in them, and the same in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, denoiser_of, require_attachment
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.families import find_spec
from agd_fast.forward import forward_parameters
from agd_fast.spec import DenoiserSpec
from conftest import trained
from tiny import TinyFamily


@torch.no_grad()
def run(pipe: Any, family: TinyFamily, rows: tuple[int, ...] = (0, 1), **arguments: Any) -> Tensor:
    """What one call gives for these rows of the inputs, a seed each. A plain pipeline's guider is set, where it has one."""
    arguments = {name: [value] * len(rows) if isinstance(value, str) else value for name, value in arguments.items()}
    if getattr(pipe, "guider", None) is not None and not is_wrapped(pipe):
        pipe.guider.guidance_scale = arguments.pop("guidance_scale")
    inputs = {name: [value[row] for row in rows] for name, value in family.inputs(max(rows) + 1).items()}
    generators = [torch.Generator().manual_seed(row) for row in rows]
    return torch.as_tensor(pipe(**{**inputs, **family.call, "generator": generators, **arguments})[0])


def attach_trained(pipe: Any, **config: Any) -> None:
    """Adapters that have an effect on every denoiser, the same for the same pipeline."""
    torch.manual_seed(1)
    agd.attach(pipe, agd.AdapterConfig(**{"hidden": 2, **config}))
    for denoiser in denoisers(pipe).values():
        trained(require_attachment(denoiser).adapter)


def to_distil(pipe: Any, family: TinyFamily) -> dict[str, Any]:
    """Arguments of `agd.distill` for three rows of inputs, at the scales by which the pipeline guides, up to ω = 6."""
    return {
        "inputs": family.inputs(3),
        "call": {name: value for name, value in family.call.items() if name != "num_inference_steps" and value != "latent"},
        "guidance_range": (spec_for(pipe).guides_above - family.omega_offset, 6.0 - family.omega_offset),
    }


def spec_for(pipe: Any) -> DenoiserSpec:
    return find_spec(denoiser_of(pipe))


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    return components_of(pipe, spec_for(pipe))


def freeze(pipe: Any) -> None:
    """As recording has it: whether weights require gradients decides by which product torch multiplies by them."""
    for denoiser in denoisers(pipe).values():
        denoiser.requires_grad_(False)


@dataclass
class Forward:
    """Arguments by name, and the output: a tensor, a list of them stacked. size: number of samples."""

    component: str
    arguments: dict[str, Any]
    output: Tensor
    size: int


@dataclass
class Watched:
    """The forwards before each of the scheduler's steps, and the prediction that it was handed."""

    steps: list[list[Forward]] = field(default_factory=list)
    handed: list[Tensor] = field(default_factory=list)


@contextmanager
def watched(pipe: Any) -> Iterator[Watched]:
    spec, found, step = spec_for(pipe), Watched(), pipe.scheduler.step
    since: list[Forward] = []

    @functools.wraps(step)  # pipelines read its signature
    def watch_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        found.steps.append([*since])
        found.handed.append(model_output.clone())
        since.clear()
        return step(model_output, *args, **kwargs)

    def watch_forward(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            arguments = _mapped({**dict(zip(forward_parameters(module), args, strict=False)), **kwargs}, torch.clone)
            since.append(Forward(name, arguments, _tensor_of(output).clone(), len(arguments[spec.sample])))

        return note

    with ExitStack() as stack:
        for name, denoiser in denoisers(pipe).items():
            stack.callback(denoiser.register_forward_hook(watch_forward(name), with_kwargs=True).remove)
        pipe.scheduler.step = watch_step
        stack.callback(vars(pipe.scheduler).pop, "step")
        yield found


class _Wide(TorchFunctionMode):
    """What a model computes in float32, whatever its weights are in, it computes in float64 inside."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64, torch.complex64: torch.complex128}
        args = [wide.get(one, one) if isinstance(one, torch.dtype) else one for one in args]
        kwargs = {n: wide.get(one, one) if isinstance(one, torch.dtype) else one for n, one in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*args, **kwargs)


@torch.no_grad()
def exact_output(denoiser: nn.Module, forward: Forward, omega: Tensor | None = None) -> Tensor:
    """The same forward in float64; omega: [1] or [B], with the adapter armed."""
    exact = copy.deepcopy(denoiser).double()
    attachment = attachment_of(exact)
    if attachment is not None:
        attachment.adapter.double()
        attachment.omega = omega
    arguments = _mapped(forward.arguments, lambda one: one.double() if one.is_floating_point() else one)
    with _Wide():
        return _tensor_of(exact(**arguments))


def _tensor_of(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    return torch.stack(found) if isinstance(found, list) else found


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(inner, change) for name, inner in value.items()}
    return type(value)(_mapped(inner, change) for inner in value) if isinstance(value, (list, tuple)) else value
