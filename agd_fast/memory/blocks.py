"""Blocks that run again in backward: diffusers' gradient checkpointing, for as long as it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def has_blocks(denoiser: nn.Module) -> bool:
    """Whether it is a model whose blocks can run again."""
    return bool(getattr(denoiser, "_supports_gradient_checkpointing", False))


@contextmanager
def checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a block keeps its input alone, and runs again in backward."""
    was = bool(denoiser.is_gradient_checkpointing)
    denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        if not was:
            denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
