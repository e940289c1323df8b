"""Who teaches: each denoiser of a pipeline, guided as the pipeline does, or else the Teacher that was given or made."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from agd_fast.attaching import components_of, own_call, spec_of
from agd_fast.datasets import captions, read_prompts
from agd_fast.pipelines import Inputs, PipelineTeacher
from agd_fast.sites import label_count
from agd_fast.spec import DenoiserSpec
from agd_fast.teacher import Conditions, Teacher, as_teacher

Prompts = Sequence[str] | str | os.PathLike[str]
Named = tuple[str, Teacher, dict[str, torch.Tensor]]  # component, teacher, table of conditions


def teachers_of(
    model: Any,
    *,
    prompts: Prompts | None,
    inputs: Inputs | None,
    class_labels: Any,
    conditions: Conditions | None,
    null_condition: Conditions | None,
    call: Mapping[str, Any] | None,
    guider: Any,
    scheduler: Any,
    spec: DenoiserSpec | None,
) -> list[Named]:
    """The teachers of all denoisers. Raises: ValueError, TypeError when the arguments do not fit the model."""
    of_pipeline = {"prompts": prompts, "inputs": inputs, "call": call, "teacher": guider}
    if prompts is not None and inputs is not None:
        raise ValueError("expected prompts or inputs, found both")
    by_itself = isinstance(model, DiffusionPipeline) and class_labels is None and conditions is None and scheduler is None
    if by_itself and (inputs is not None or "prompt" in inspect.signature(own_call(model)).parameters):
        rows = inputs if inputs is not None else {"prompt": _prompts(prompts)}
        names = components_of(model, spec_of(model, spec))
        teachers = [PipelineTeacher.of(model, name, inputs=rows, call=call, guider=guider, spec=spec) for name in names]
        return [(name, one, one.conditions()) for name, one in zip(names, teachers, strict=True)]
    given = [name for name, value in of_pipeline.items() if value is not None]
    if given:
        raise ValueError(
            f"{', '.join(given)} go(es) with a text pipeline of diffusers alone, whose own runs are followed; found "
            f"{type(model).__name__} with labels, conditions or a scheduler. A rule of guidance for it: "
            "agd_fast.Teacher(guidance=...)"
        )
    teacher = as_teacher(model, scheduler, spec=spec, null_condition=null_condition)
    if class_labels is None and conditions is None:
        class_labels = _all_labels(teacher)
    table = teacher.conditions(class_labels, conditions)
    teacher.require_conditional(table)
    return [("", teacher, table)]


def _all_labels(teacher: Teacher) -> range | None:
    """Every label of a class-conditional model except the unconditional one, which comes last; None without such labels."""
    conditions = teacher.spec.adapted
    count = label_count(teacher.denoiser, conditions[0]) if len(conditions) == 1 else None
    null = teacher.null({conditions[0].argument: torch.zeros(1, dtype=torch.long)}) if count else {}
    last = [int(value) for value in null.values()] == [(count or 0) - 1]
    return range(count - 1) if count and last else None


def _prompts(prompts: Prompts | None) -> list[str]:
    """The prompts as a list. Raises: FileNotFoundError; ValueError when there are none, or one is not a text."""
    if prompts is None:
        return captions()
    if isinstance(prompts, (str, os.PathLike)):
        return read_prompts(prompts)
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise ValueError(f"expected prompts as texts, found {prompt!r}")
    found = [prompt.strip() for prompt in prompts if prompt.strip()]
    if not found:
        raise ValueError("expected at least one prompt, found none")
    return found
