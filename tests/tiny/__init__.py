"""Tiny pipelines of diffusers with random weights, built offline: one file a family."""

from tiny.family import FAMILIES, TinyFamily

__all__ = ["FAMILIES", "TinyFamily"]
