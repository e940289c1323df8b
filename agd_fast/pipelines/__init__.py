"""Pipelines of diffusers as teachers: what they compute is recorded from their own runs, not reimplemented."""

from agd_fast.pipelines.inputs import Inputs
from agd_fast.pipelines.runs import ARMS, Arm
from agd_fast.pipelines.teacher import PipelineTeacher

__all__ = ["ARMS", "Arm", "Inputs", "PipelineTeacher"]
