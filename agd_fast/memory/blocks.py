"""Blocks that run again in backward: diffusers' gradient checkpointing, for as long as it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from agd_fast.freezing import restoring

_SET = ("gradient_checkpointing", "_gradient_checkpointing_func")  # on every module that can


def has_blocks(denoiser: nn.Module) -> bool:
    """Whether it is a model whose blocks can run again."""
    return bool(getattr(denoiser, "_supports_gradient_checkpointing", False))


@contextmanager
def checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Inside, a block keeps its input alone, and runs again in backward. What was set before is set again afterwards.

    The state of random numbers is kept for it only where a module may draw some: looking at it waits for the device, and cannot
    be part of a CUDA graph.
    """
    modules = [module for module in denoiser.modules() if hasattr(module, _SET[0])]
    draws = any(module.training for module in denoiser.modules())
    with restoring(modules, _SET):
        denoiser.enable_gradient_checkpointing(_Again(draws))  # type: ignore[operator]
        yield


def makes_all_again(function: Callable[..., Any]) -> bool:
    """Whether a checkpointing function is ours, or one around it: others may keep a part of what they run."""
    while (inner := getattr(function, "checkpoint", None)) is not None:  # an armed adapter's
        function = inner
    return isinstance(function, _Again)


@dataclass(frozen=True)
class _Again:
    """What diffusers' own checkpointing function does. draws: whether random numbers are to be the same again."""

    draws: bool

    def __call__(self, module: nn.Module, *args: Any) -> Any:
        return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=self.draws)
