"""Which of a pipeline's models are on the card while one of its denoisers is distilled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar, get_args

import torch
from torch import nn

from agd_fast.attaching import require_attachment
from agd_fast.distillation.passes import few_at_once, first_few
from agd_fast.forward import device_of
from agd_fast.memory.choose import USABLE, Memory, budget_on
from agd_fast.memory.estimate import states_memory
from agd_fast.memory.streaming import HOST, offloads, streamable, streamed, unhooked_after, unpin
from agd_fast.memory.twin import meta_twin
from agd_fast.pipelines import PipelineTeacher
from agd_fast.teacher import Conditions, Teacher
from agd_fast.warning import first_line, warn

T = TypeVar("T")

_OF_OFFLOADING = ("_all_hooks", "_offload_gpu_id", "_offload_device")  # attributes that diffusers sets on a pipeline
UNCOUNTED = 2 / 3  # fraction of what a model and a forward take that is assumed to be weights, if it cannot be counted
SHARE = 1 / 3  # of a card: weights up to this fraction leave room for several samples


@dataclass(frozen=True)
class Residency:
    """Where the models of a teacher are, and how many samples its denoiser sees at once without gradients.

    device: where it is computed. samples: with None, all models are on the device and batches are whole. With a number, a model
    is on the device only for its own forwards: text encoders encode a run's prompts, then leave; the denoiser takes the steps, in
    forwards of so many samples; only it is there for training. If one does not fit, the weights of all come layer by layer.
    Whatever offloads a pipeline already goes on doing so. table: of conditions.
    """

    teacher: Teacher
    device: torch.device
    samples: int | None = None
    table: Conditions = field(default_factory=dict)

    @classmethod
    def of(cls, teacher: Teacher, device: torch.device, memory: Memory | None, states: int, table: Conditions) -> Residency:
        """What `distill(memory=...)` asks for: to save memory, with "auto" only if all weights are over SHARE of the card.

        states: per forward of a Teacher; for a pipeline, whose samples are large, it is one.
        """
        everything = cls(teacher, device)
        short = memory not in (None, "auto") or (memory == "auto" and everything._crowded)
        return cls(teacher, device, 1 if isinstance(teacher, PipelineTeacher) else states, table) if short else everything

    @property
    def short(self) -> bool:
        """Whether memory is short."""
        return self.samples is not None

    @property
    def card(self) -> torch.device | None:
        """Where the denoiser is to be brought for training; None leaves it where it is."""
        return self.device if self.short and self._moves else None

    @cached_property
    def why_streamed(self) -> str:
        """Why weights come from host memory one layer at a time while states are collected and the adapter is measured: a model
        does not fit together with what a forward takes. Empty if all do. To be read inside `kept`, once there is an adapter."""
        component = self._component
        if self.samples is None or not self._moves or not streamable(component):
            return ""
        adapter = require_attachment(component).adapter
        budget = budget_on(self.device, _resident([adapter], self.device))
        if budget is None:
            return ""
        needed, usable = self._states(self.samples) / 2**30, USABLE * budget / 2**30
        return "" if needed <= usable else f"the largest model and a forward would take {needed:.2f} of {usable:.2f} GiB"

    def place(self) -> None:
        if not self.short:
            self.teacher.to(self.device)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around everything else: if memory is short, the models start in host memory; afterwards they are where they were."""
        if self.samples is None or not self._moves:
            yield
            return
        with _returned(self._modules):
            _move(self._modules, HOST)
            try:
                yield
            finally:
                unpin(self._modules)

    def run(self, what: str, work: Callable[[], T]) -> T:
        """Do `work`, guided runs or pictures, inside `kept`; if memory runs out, once more with weights in host memory.

        Raises: torch.OutOfMemoryError naming `what` and what may help.
        """
        try:
            with self._running():
                return work()
        except torch.OutOfMemoryError as error:
            found = f"{what} ran out of memory ({first_line(error)})"
        if self.card is None or self.why_streamed or not streamable(self._component):
            few = "smaller samples, or fewer at once by TrainConfig(micro_batch_size=...)"
            modes = ", ".join(repr(one) for one in get_args(Memory) if one != "auto")
            one_model = f"one of memory={modes}, where one model is on the card at a time; the same output_dir goes on"
            raise torch.OutOfMemoryError(f"{found}; expected {few if self.short else one_model}")
        warn(f"{found}; going on with weights that stay in host memory")
        vars(self)["why_streamed"] = found
        return self.run(what, work)

    @contextmanager
    def _running(self) -> Iterator[None]:
        if self.samples is None:
            yield
            return
        teacher = self.teacher
        with ExitStack() as stack:
            if self._moves:
                stack.enter_context(_returned(self._modules))
                if self.why_streamed:
                    _move(self._modules, HOST)
                    stack.enter_context(streamed([module for module in self._modules if streamable(module)], self.device))
                    _move([module for module in self._modules if not streamable(module)], self.device)
                elif isinstance(teacher, PipelineTeacher) and teacher.pipe.model_cpu_offload_seq is not None:
                    stack.enter_context(_one_at_a_time(teacher.pipe, self.device))
                else:
                    _move(self._modules, self.device)
            stack.enter_context(few_at_once(self._component, teacher.spec, self.samples))
            yield

    @property
    def _component(self) -> nn.Module:
        """The denoiser as it is called, compiled if it is."""
        teacher = self.teacher
        return getattr(teacher.owner, teacher.component) if isinstance(teacher, PipelineTeacher) else teacher._call

    def _states(self, samples: int) -> int:
        """Bytes of the largest model, an adapter and a forward without gradients."""
        teacher = self.teacher
        try:
            arguments = first_few(teacher.arguments_on_meta(self.table, samples), teacher.spec, samples)
            return states_memory(meta_twin(teacher.denoiser), teacher.spec, arguments, self._modules)[0].total
        except Exception:  # its forward needs values, or a card: a model's code may raise anything on meta
            return int(max(sum(p.nbytes for p in module.parameters()) for module in self._modules) / UNCOUNTED)

    @property
    def _modules(self) -> list[nn.Module]:
        if not isinstance(self.teacher, PipelineTeacher):
            return [self.teacher.denoiser]
        found = [module for module in self.teacher.pipe.components.values() if isinstance(module, nn.Module)]
        return [module for module in dict.fromkeys(found) if _movable(module)]

    @property
    def _moves(self) -> bool:
        if self.device == HOST:
            return False
        if not isinstance(self.teacher, PipelineTeacher):
            return not offloads(self.teacher.denoiser)
        pipe = self.teacher.pipe
        models = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
        return not (getattr(pipe, "_all_hooks", None) or pipe.hf_device_map is not None or any(map(offloads, models)))

    @property
    def _crowded(self) -> bool:
        weights = sum(p.nbytes for module in self._modules for p in module.parameters())
        budget = budget_on(self.device, _resident(self._modules, self.device))
        return budget is not None and weights > SHARE * budget


def _resident(modules: Sequence[nn.Module], device: torch.device) -> int:
    """Bytes of the modules' parameters that are on the device."""
    return sum(p.nbytes for module in modules for p in module.parameters() if p.device.type == device.type)


def _movable(module: nn.Module) -> bool:
    """Whether it can be moved: not if bitsandbytes keeps it in 8 bits on its card, nor if it is offloaded piece by piece."""
    parameters = list(module.parameters())
    on_meta = any(parameter.device.type == "meta" for parameter in parameters)
    return bool(parameters) and not on_meta and not getattr(module, "is_loaded_in_8bit", False)


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the modules are on the device."""
    with _returned(modules):
        _move(modules, device)
        yield


@contextmanager
def _returned(modules: Sequence[nn.Module]) -> Iterator[None]:
    devices = [(module, device_of(module)) for module in modules]
    try:
        yield
    finally:
        for here in sorted({device for _, device in devices}, key=lambda device: device != HOST):  # first those that leave a card
            _move([module for module, device in devices if device == here], here)


@contextmanager
def _one_at_a_time(pipe: Any, device: torch.device) -> Iterator[None]:
    """diffusers' own offloading of whole models, removed again afterwards."""
    before = {name: vars(pipe)[name] for name in _OF_OFFLOADING if name in vars(pipe)}
    with unhooked_after([module for module in pipe.components.values() if isinstance(module, nn.Module)]):
        pipe.enable_model_cpu_offload(device=device)
        try:
            yield
        finally:
            pipe.remove_all_hooks()
            for name in _OF_OFFLOADING:
                vars(pipe).pop(name, None)
            vars(pipe).update(before)
