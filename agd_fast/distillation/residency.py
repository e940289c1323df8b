"""Which of a pipeline's models are on the card while one of its denoisers is distilled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from agd_fast.distillation.passes import few_at_once
from agd_fast.memory.choose import Memory
from agd_fast.pipelines import PipelineTeacher
from agd_fast.spec import device_of
from agd_fast.teacher import Teacher

_OF_OFFLOADING = ("_all_hooks", "_offload_gpu_id", "_offload_device")  # what diffusers writes on a pipeline
HOST = torch.device("cpu")
SHARE = 1 / 3  # of a card: weights that leave room for a few samples more than one


@dataclass(frozen=True)
class Residency:
    """Where the models of a teacher are, and how many samples its denoiser sees at once without gradients.

    device: where it is computed. samples: None leaves both as they are: all models on the device, batches whole. With a number
    a model is on the device for its own forwards alone: text encoders encode a run's prompts, then go; the denoiser steps, in
    forwards of so many samples; only it stays for training. Whatever offloads a pipeline already goes on doing so.
    """

    teacher: Teacher
    device: torch.device
    samples: int | None = None

    @classmethod
    def of(cls, teacher: Teacher, device: torch.device, memory: Memory | None, states: int) -> Residency:
        """As the modes of `distill(memory=...)` want it; "auto", where all of the weights are a good part of the card.

        states: of one forward of a Teacher; of a pipeline, whose samples are large, it is one.
        """
        everything = cls(teacher, device)
        short = memory not in (None, "auto") or (memory == "auto" and everything._crowded)
        return cls(teacher, device, 1 if isinstance(teacher, PipelineTeacher) else states) if short else everything

    @property
    def short(self) -> bool:
        """Whether memory is."""
        return self.samples is not None

    def place(self) -> None:
        if not self.short:
            self.teacher.to(self.device)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Around everything else: where memory is short, the models are where they were afterwards."""
        if self.samples is None or not self._moves:
            yield
            return
        with _returned(self._modules):
            _move(self._modules, HOST)
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around guided runs and pictures, inside `kept`."""
        if self.samples is None:
            yield
            return
        teacher = self.teacher
        with ExitStack() as stack:
            if self._moves:
                stack.enter_context(_returned(self._modules))
                if isinstance(teacher, PipelineTeacher) and teacher.pipe.model_cpu_offload_seq is not None:
                    stack.enter_context(_one_at_a_time(teacher.pipe, self.device))
                else:
                    _move(self._modules, self.device)
            component = getattr(teacher.owner, teacher.component) if isinstance(teacher, PipelineTeacher) else teacher._call
            stack.enter_context(few_at_once(component, teacher.spec, self.samples))
            yield

    @contextmanager
    def training(self) -> Iterator[None]:
        """Around training, inside `kept`: the denoiser alone is on the device."""
        if self.samples is None or not self._moves:
            yield
            return
        with _returned([self.teacher.denoiser]):
            self.teacher.denoiser.to(self.device)
            yield

    @property
    def _modules(self) -> list[nn.Module]:
        if not isinstance(self.teacher, PipelineTeacher):
            return [self.teacher.denoiser]
        found = [module for module in self.teacher.pipe.components.values() if isinstance(module, nn.Module)]
        return [module for module in found if _movable(module)]

    @property
    def _moves(self) -> bool:
        pipe = getattr(self.teacher, "pipe", None)
        offloaded = pipe is not None and (getattr(pipe, "_all_hooks", None) or pipe.hf_device_map is not None)
        return self.device != HOST and not offloaded

    @property
    def _crowded(self) -> bool:
        if self.device.type != "cuda":
            return False
        weights = sum(p.nbytes for module in self._modules for p in module.parameters())
        return weights > SHARE * torch.cuda.get_device_properties(self.device).total_memory


def _movable(module: nn.Module) -> bool:
    """Not what bitsandbytes keeps in 8 bits on its card, nor what is offloaded piece by piece."""
    parameters = list(module.parameters())
    on_meta = any(parameter.device.type == "meta" for parameter in parameters)
    return bool(parameters) and not on_meta and not getattr(module, "is_loaded_in_8bit", False)


def _move(modules: Sequence[nn.Module], device: torch.device) -> None:
    for module in modules:
        module.to(device)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _returned(modules: Sequence[nn.Module]) -> Iterator[None]:
    devices = [(module, device_of(module)) for module in modules]
    try:
        yield
    finally:
        for here in sorted({device for _, device in devices}, key=lambda device: device != HOST):  # first what leaves a card
            _move([module for module, device in devices if device == here], here)


@contextmanager
def _one_at_a_time(pipe: Any, device: torch.device) -> Iterator[None]:
    """diffusers' own offloading of whole models, taken off again."""
    before = {name: vars(pipe)[name] for name in _OF_OFFLOADING if name in vars(pipe)}
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.remove_all_hooks()
        for name in _OF_OFFLOADING:
            vars(pipe).pop(name, None)
        vars(pipe).update(before)
