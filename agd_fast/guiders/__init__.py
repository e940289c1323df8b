"""Guiders of diffusers: an adapter as one, and any of them as the teacher."""

from agd_fast.guiders.adapter_guidance import AdapterGuidance

__all__ = ["AdapterGuidance"]
