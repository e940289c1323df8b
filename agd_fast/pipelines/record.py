"""Recording a pipeline's guided run: the denoiser's conditional call at each step, and what the scheduler was handed.

What the scheduler is handed is the guided prediction, however the family computes it; so an adapter learns what the
pipeline itself would have produced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.attaching.find import uncompiled
from agd_fast.attaching.steps import after_forward, around_step, before_forward
from agd_fast.forward import forward_parameters, required_parameters
from agd_fast.pipelines.handed import PART, Handed, shape_of
from agd_fast.sites import config_value
from agd_fast.spec import DenoiserSpec

_NOT_RECORDED = ("return_dict",)


class UnknownShape(Exception):  # noqa: N818 (no error)
    """A shape of one sample of a denoiser's output for which the pipeline was not yet asked what part it hands on."""


@dataclass(frozen=True)
class Call:
    """The arguments of a denoiser's call for one kind of condition: x_t [B, ...], t [B] or [B, ...], and further ones by
    (dotted) name, as rows, batch first, or as constants."""

    sample: Tensor
    timestep: Tensor
    rows: dict[str, Tensor]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: the conditional call, the unconditional one where guidance was on, the guided prediction.

    index: that of the step among all steps of the run, including other denoisers'.
    """

    conditional: Call
    unconditional: Call | None
    guided: Tensor
    index: int


class Recorder:
    """Follows one run of a pipeline for one of its denoisers.

    visit: is handed every step in which that denoiser was called, and returns the guided prediction [B, ...] to go on with.
    batch: number of samples. component: the denoiser, as a compiled module if it is compiled. handed: what the scheduler gets of
    the output, by the shape of one sample of it.
    Raises: UnknownShape at the first step whose output has a shape that is not in `handed`.
    """

    def __init__(
        self,
        pipe: Any,
        component: nn.Module,
        spec: DenoiserSpec,
        batch: int,
        visit: Callable[[Step], Tensor],
        handed: Mapping[tuple[int, ...], Handed],
    ) -> None:
        self.pipe, self.component, self.spec, self.batch, self.visit, self.handed = pipe, component, spec, batch, visit, handed
        self.parameters = forward_parameters(uncompiled(component))
        self.required = required_parameters(uncompiled(component))
        self.shape: tuple[int, ...] = ()
        self.calls: list[dict[str, Any]] = []
        self.done = 0  # steps
        self.visited = False

    def run(self, call: Callable[[], Any]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(before_forward(self.component, self._called))
            stack.enter_context(after_forward(self.component, self._returned))
            stack.enter_context(around_step(self.pipe.scheduler, self._stepped))
            return call()

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls.append({**dict(zip(self.parameters, args, strict=False)), **kwargs})

    def _returned(self, output: Any) -> Any:
        self.shape = shape_of(output)
        return output

    def _stepped(self, step: Callable[..., Any], model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls, self.calls = self.calls, []
        if calls:  # else another denoiser's step
            halves = [half for call in calls for half in self._halves(call)]
            if len(halves) > 2:
                raise ValueError(
                    f"{type(self.pipe).__name__} guides by {len(halves)} branches; expected two, the conditional and the "
                    "unconditional one"
                )
            first = self.spec.pipeline.conditional == "first"
            conditional, unconditional = (halves[0], halves[-1]) if first else (halves[-1], halves[0])
            if self.shape not in self.handed:
                raise UnknownShape(self.shape)
            handed = self.handed[self.shape]
            guided = handed.prediction(self._one_half(model_output))
            self.visited = True
            found = Step(conditional, unconditional if len(halves) == 2 else None, guided, self.done)
            prediction = handed.handed(self.visit(found), self._one_half(model_output))
            model_output = torch.cat([prediction, prediction]) if self._is_doubled(model_output) else prediction
            self.calls = []  # without the calls that the visitor made
        self.done += 1
        return step(model_output, *args, **kwargs)

    def _halves(self, call: dict[str, Any]) -> list[Call]:
        sample = call[self.spec.sample]
        if not isinstance(sample[0], Tensor):
            raise ValueError(
                f"{type(self.pipe).__name__} passes its denoiser several tensors a sample, of pictures beside it; expected one"
            )
        size = len(sample)
        if size % self.batch:
            raise ValueError(
                f"{type(self.pipe).__name__} called its denoiser with a batch of {size} for {self.batch} samples; expected a "
                "multiple"
            )
        rows, constants = self._split(call, size)
        constants |= self._part()
        parts = []
        for start in range(0, size, self.batch):
            here = slice(start, start + self.batch)
            part = {name: self._stacked(name, value[here]) for name, value in rows.items()}
            parts.append(Call(part.pop(self.spec.sample), part.pop(self.spec.timestep), part, constants))
        return parts

    def _part(self) -> dict[str, Any]:
        """Which part of the output is handed on, if it is not what a `Teacher` takes anyway."""
        handed, channels = self.handed.get(self.shape), config_value(uncompiled(self.component), self.spec.guided_channels)
        return {} if handed is None or handed.is_leading(channels) else {PART: handed.part}

    def _split(self, call: dict[str, Any], size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arguments with one entry per sample, and those that all samples share."""
        rows: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for name, value in call.items():
            if name in self.spec.listed:
                rows[name] = value
            elif name in self.spec.repeated:
                constants[name] = _literal(name, [self._entry_of_all(name, value)])
            elif name == self.spec.timestep:
                t = torch.as_tensor(value, device=_device_of(call[self.spec.sample]))
                rows[name] = t.reshape(-1).expand(size) if t.ndim < 2 and t.numel() == 1 else t
            elif value is None and name in self.required:
                constants[name] = None
            elif name not in _NOT_RECORDED:
                for path, leaf in _leaves(name, value):
                    dim = self.spec.batch_dim(path)
                    if path in self.spec.grouped:
                        leaf = leaf.unflatten(0, (size, -1))
                    if isinstance(leaf, Tensor) and dim is not None and leaf.ndim > dim and leaf.shape[dim] == size:
                        rows[path] = leaf.movedim(dim, 0)
                    else:
                        constants[path] = _literal(path, leaf)
        return rows, constants

    def _entry_of_all(self, name: str, value: Sequence[Any]) -> Any:
        if any(entry != value[0] for entry in value):
            raise ValueError(
                f"{name} differs from sample to sample, {[*value]}; expected one sample a run (shard_size=1), as one is stored"
            )
        return value[0]

    def _stacked(self, name: str, value: Tensor | list[Tensor]) -> Tensor:
        if isinstance(value, Tensor):
            return value
        if len({tuple(one.shape) for one in value}) != 1:
            raise ValueError(
                f"{name} holds tensors of several shapes, {[tuple(one.shape) for one in value]}; expected one sample a run "
                "(shard_size=1), as such prompts cannot be stored as rows of one tensor"
            )
        return torch.stack(value)

    def _one_half(self, model_output: Tensor) -> Tensor:
        """The conditional half if the pipeline keeps a doubled batch of latents, else all."""
        if not self._is_doubled(model_output):
            return model_output
        first, second = model_output.chunk(2)
        return first if self.spec.pipeline.conditional == "first" else second

    def _is_doubled(self, model_output: Tensor) -> bool:
        """Decided by its size, because frames of a video may be entries of the batch too."""
        return model_output.numel() == 2 * self.batch * len(self.handed[self.shape].order)


def _leaves(name: str, value: Any) -> list[tuple[str, Any]]:
    """A value, or the values inside it if it holds tensors, by dotted path; None is left out."""
    if isinstance(value, Mapping):
        return [leaf for key, inner in value.items() for leaf in _leaves(f"{name}.{key}", inner)]
    if isinstance(value, (list, tuple)) and _holds_tensors(value):
        return [leaf for index, inner in enumerate(value) for leaf in _leaves(f"{name}.{index}", inner)]
    return [] if value is None else [(name, value)]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_holds_tensors, value)))


def _literal(path: str, value: Any) -> Any:
    plain = (bool, int, float, str)
    if isinstance(value, (Tensor, *plain)) or (isinstance(value, (list, tuple)) and all(_is_plain(inner) for inner in value)):
        return value
    raise ValueError(f"cannot record the argument {path!r}: expected a tensor, number, text or a list of them, found {value!r}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(inner) for inner in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _device_of(sample: Any) -> torch.device:
    return sample[0].device
