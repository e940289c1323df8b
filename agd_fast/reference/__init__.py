"""Adapters that were trained with the paper's public reference code (github.com/cristianpjensen/agd)."""

from agd_fast.reference.convert import convert

__all__ = ["convert"]
