"""Guiders of diffusers: an adapter as a guider, and any guider as the teacher."""

from agd_fast.guiders.adapter_guidance import AdapterGuidance

__all__ = ["AdapterGuidance"]
