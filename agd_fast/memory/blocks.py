"""Blocks that run again in backward: diffusers' gradient checkpointing, for the duration of a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from agd_fast.freezing import restoring

_SET = ("gradient_checkpointing", "_gradient_checkpointing_func")  # on every module that supports it


def has_blocks(denoiser: nn.Module) -> bool:
    """Whether the model's blocks can run again in backward."""
    return bool(getattr(denoiser, "_supports_gradient_checkpointing", False))


@contextmanager
def checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a block keeps only its input and runs again in backward. Afterwards the settings are as they were.

    The state of the random generators is saved only if a module may draw random numbers: reading that state waits for the device
    and cannot be part of a CUDA graph.
    """
    modules = [module for module in denoiser.modules() if hasattr(module, _SET[0])]
    draws = any(module.training for module in denoiser.modules())
    with restoring(modules, _SET):
        denoiser.enable_gradient_checkpointing(_Again(draws))  # type: ignore[operator]
        yield


def makes_all_again(function: Callable[..., Any]) -> bool:
    """Whether a checkpointing function is ours, or wraps ours, and so recomputes everything; others may keep a part."""
    while (inner := getattr(function, "checkpoint", None)) is not None:  # wrapped, for example by an armed adapter
        function = inner
    return isinstance(function, _Again)


@dataclass(frozen=True)
class _Again:
    """Does what diffusers' own checkpointing function does. draws: whether a re-run must draw the same random numbers."""

    draws: bool

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=self.draws)
