"""Pipelines of diffusers as teachers: what they compute is recorded from their own runs, not written again."""

from agd_fast.pipelines.teacher import ARMS, Arm, PipelineTeacher

__all__ = ["ARMS", "Arm", "PipelineTeacher"]
