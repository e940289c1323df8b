"""What the backend and the engine's pieces use of torch beyond its documented interface, which a new version may change.

It has run with torch 2.8, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend

CompiledFn = Callable[..., Sequence[Any]]


def is_weight(example: Any) -> bool:
    """Whether an input of a graph that Dynamo made is a parameter of the model, not an argument of the call."""
    return isinstance(example, nn.Parameter)


def outside_of_dynamo() -> AbstractContextManager[Any]:
    """A context in which recorded and compiled graphs do not become part of the one that Dynamo is about to compile."""
    return torch._guards.tracing(None)


def has_symbols(inputs: Sequence[Any]) -> bool:
    """Whether a graph is for more than one shape."""
    return any(
        not isinstance(one, Tensor) or any(isinstance(size, torch.SymInt) for size in (*one.shape, *one.stride()))
        for one in inputs
    )


def compile_with(name: str, module: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> CompiledFn:
    """A graph compiled by inductor, or by another backend that torch knows by name. The result takes the inputs as arguments."""
    if name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, list(inputs), config_patches=options or None)  # type: ignore[return-value]
    return lookup_backend(name)(module, list(inputs))


def inductor_options(mode: str | None) -> dict[str, Any]:
    """The options that a mode of torch.compile stands for. Raises: ValueError for an unknown mode, or one with CUDA graphs."""
    if mode in (None, "default"):
        return {}
    modes = torch._inductor.list_mode_options()
    if mode not in modes:
        raise ValueError(f"mode must be one of {', '.join(map(repr, modes))}; found {mode!r}")
    if modes[mode].get("triton.cudagraphs"):
        raise ValueError(
            f"mode={mode!r} records CUDA graphs of its own, which would copy all weights; expected None, 'default' or "
            "'max-autotune-no-cudagraphs' (agd_fast.optimize records one CUDA graph a step)"
        )
    return modes[mode]
