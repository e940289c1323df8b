"""What happens in one call of a pipeline, seen from outside: its denoiser's forwards and its scheduler's steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def before_forward(component: nn.Module, action: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """Call `action(args, kwargs)` before every forward of a denoiser, outside of what torch.compile compiles."""
    compiled = component._compiled_call_impl
    if compiled is None:
        handle = component.register_forward_pre_hook(lambda _, args, kwargs: action(args, kwargs), with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        action(args, kwargs)
        return compiled(*args, **kwargs)

    with _called_instead(component, call):
        yield


@contextmanager
def after_forward(component: nn.Module, action: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, every forward of a denoiser returns `action(output)`, outside of what torch.compile compiles."""
    compiled = component._compiled_call_impl
    if compiled is None:
        handle = component.register_forward_hook(lambda _, args, output: action(output))
        try:
            yield
        finally:
            handle.remove()
        return
    with _called_instead(component, lambda *args, **kwargs: action(compiled(*args, **kwargs))):
        yield


@contextmanager
def _called_instead(component: nn.Module, call: Any) -> Iterator[None]:
    """Inside, `call` replaces the call of a denoiser that is compiled in place, because its hooks would be compiled too."""
    compiled = component._compiled_call_impl
    call.inner = compiled
    component._compiled_call_impl = call
    try:
        yield
    finally:
        if component._compiled_call_impl is call:  # else the engine was removed inside
            component._compiled_call_impl = compiled


@contextmanager
def around_step(scheduler: Any, action: Callable[..., Any]) -> Iterator[None]:
    """Inside, `scheduler.step(model_output, …)` is `action(step, model_output, …)` with its own `step`."""
    step = scheduler.step
    was_set = "step" in vars(scheduler)  # by an enclosing `around_step`
    scheduler.step = functools.wraps(step)(functools.partial(action, step))  # pipelines read its signature
    try:
        yield
    finally:
        if was_set:
            scheduler.step = step
        else:
            del scheduler.step


def number_of_steps(pipe: Any) -> int:
    """Number of denoising steps of the current call: img2img makes fewer than the schedule has."""
    return getattr(pipe, "_num_timesteps", None) or len(pipe.scheduler.timesteps)
