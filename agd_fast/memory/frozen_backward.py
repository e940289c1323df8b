"""Backward pass through a model whose weights are frozen, in less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from agd_fast.attaching import uncompiled
from agd_fast.memory.blocks import makes_all_again
from agd_fast.memory.handlers import HANDLERS
from agd_fast.memory.interception import FrozenBackward, Run
from agd_fast.memory.modes import Mode, find_mode
from agd_fast.memory.provenance import Plan

_MARK = "_agd_frozen_backward"
_CHECKPOINT = "_gradient_checkpointing_func"
_COMPILED = "_compiled_call_impl"  # on modules that were compiled in place; inside, they run their own forward
_ABSENT = object()


@contextmanager
def frozen_backward(model: nn.Module, activations: str | Mode = "4bit") -> Iterator[None]:
    """Inside this context, forward passes of `model` keep only what the gradients of its inputs, and of weights outside it, need.

    model: any module whose own weights are frozen; adapters that agd_fast attaches do not count as its own. In every mode, its
        outputs are the same bit for bit. Forward passes under no_grad are not changed.
    activations: what is kept for the backward pass, and how precisely.
        - "exact": nothing is rounded. A convolution keeps nothing, a norm its input, attention q, k and v.
        - "8bit": all of this in 8 bits.
        - "4bit": as "8bit", but the factors of feed-forwards, and the normalized input x̂ of norms that nothing else needs, in
          4 bits.
        - "recompute": as "4bit", but q, k, v and feed-forwards are recomputed from x̂.
        - A Mode instead of a name sets each choice.

    The model runs eagerly inside: what torch.compile made of it, or of its blocks, is bypassed. The re-runs of diffusers'
    gradient checkpointing keep what the mode says too. Plain autograd still handles functions that were compiled, other uses of
    torch.utils.checkpoint, and forward passes under forward-mode AD or a transform of torch.func. Autograd refuses second-order
    gradients.

    Raises: ValueError for an unknown mode, a weight of the model that requires grad, or a model that is already inside such a
    context.
    """
    mode = find_mode(activations)
    given, model = model, uncompiled(model)
    _require_frozen(model)
    plan = Plan()
    blocks = _Blocks(model)

    def forward(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal plan
        if not torch.is_grad_enabled() or _is_transformed():
            return own(*args, **kwargs)
        run = Run(mode, plan.again())
        with blocks.followed(run), FrozenBackward(run, HANDLERS):
            output = own(*args, **kwargs)
        run.forget()
        plan = run.plan.following()
        return output

    with ExitStack() as stack:
        modules = [*model.modules()]
        stack.enter_context(_set((module, _COMPILED, None) for module in modules if getattr(module, _COMPILED) is not None))
        stack.enter_context(_set((module, _MARK, True) for module in modules))
        own = model.forward
        wrapper = torch.compiler.disable(functools.wraps(own)(functools.partial(forward, own)), reason="agd_fast.frozen_backward")
        stack.enter_context(_set([(model, "forward", wrapper)]))
        if given is not model:
            stack.enter_context(_set([(given, "forward", model)]))
        yield


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode AD is active."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def _require_frozen(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            raise ValueError(
                f"frozen_backward expects a model whose weights are frozen, by requires_grad_(False); {name!r} of this "
                f"{type(model).__name__} requires grad"
            )
    for name, module in model.named_modules():
        if _MARK in vars(module):
            raise ValueError(f"{name or type(model).__name__!r} is inside frozen_backward already; expected one around the whole")


@contextmanager
def _set(attributes: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Sets attributes of instances; afterwards they are as they were."""
    before = []
    for module, name, value in attributes:
        own = vars(module)
        before.append((own, name, own.get(name, _ABSENT)))
        own[name] = value
    try:
        yield
    finally:
        for own, name, value in before:
            if value is _ABSENT:
                own.pop(name, None)
            else:
                own[name] = value


class _Blocks:
    """The modules of a model that checkpointing may run again in backward; re-runs are intercepted as their forward was."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]

    def followed(self, run: Run) -> AbstractContextManager[None]:
        checkpointed = [module for module in self.modules if module.gradient_checkpointing]
        return _set((module, _CHECKPOINT, _Rerun(getattr(module, _CHECKPOINT), self, run)) for module in checkpointed)


class _Rerun:
    """A checkpointing function whose re-runs keep what the forward kept."""

    def __init__(self, checkpoint: Callable[..., Any], blocks: _Blocks, run: Run) -> None:
        self.checkpoint, self.blocks, self.run = checkpoint, blocks, run

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run, first, is_forward = self.run, self.run.numbers, True

        def in_run(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_forward
            if is_forward:
                is_forward = False
                with run.region(again=makes_all_again(self.checkpoint)):
                    return function(*args, **kwargs)
            rerun = Run(run.mode, run.plan.again(), first)
            with self.blocks.followed(rerun), FrozenBackward(rerun, HANDLERS), rerun.again():
                return function(*args, **kwargs)

        return self.checkpoint(in_run, *args, **kwargs)
