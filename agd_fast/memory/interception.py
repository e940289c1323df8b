"""Intercepting the torch functions that a model's forward calls, to choose what is kept for their backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from agd_fast.memory.modes import Mode
from agd_fast.memory.provenance import Plan, Provenance
from agd_fast.memory.saved import PLAIN, Kept, Read, Saved, compiled

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Backward = Callable[..., Any]  # (gradient, which inputs need one, *values) → one gradient per input


class Run:
    """One forward, or one re-run of a piece of it: the state that the handlers of functions work with."""

    def __init__(self, mode: Mode, plan: Plan, first: tuple[int, int] = (0, 0)) -> None:
        self.mode, self.plan = mode, plan
        self.provenance = Provenance(mode, plan)
        self.norms, self.activations = first
        self.saver: Any = None  # in a piece that is run again: the hook that receives what autograd saves
        self.reads: set[Read] | None = None  # in a re-run: tensors of others that backward reads

    @property
    def numbers(self) -> tuple[int, int]:
        """The numbers of the next norm and of the next activation."""
        return self.norms, self.activations

    def next_norm(self) -> int:
        self.norms += 1
        return self.norms - 1

    def next_activation(self) -> int:
        self.activations += 1
        return self.activations - 1

    def forget(self) -> None:
        """Let go of all activations."""
        self.provenance = Provenance(self.mode, self.plan)

    def replaces(self, tensor: Any, *frozen: Any) -> bool:
        """Whether we choose what is kept for a function of `tensor`: it needs a gradient, and the `frozen` need none."""
        for one in frozen:
            if isinstance(one, Tensor) and one.requires_grad:
                return False
        return (
            type(tensor) in PLAIN
            and tensor.requires_grad
            and tensor.dtype in _FLOATS
            and tensor.numel() >= max(self.mode.smallest, 1)
        )

    def replaces_product(self, one: Tensor, other: Tensor) -> bool:
        """As `replaces`, for a product of the two: both are real and need gradients, and at least one is large."""
        both = one.requires_grad and other.requires_grad and not one.is_complex() and not other.is_complex()
        return both and (self.replaces(one) or self.replaces(other))

    def attach(self, name: str, output: Tensor, backward: Backward, kept: tuple[Kept, ...], *inputs: Tensor) -> Tensor:
        """`output` with a grad_fn: `backward(gradient, needs, *values of what is kept)` gives the gradients of `inputs`."""
        if output._is_view():  # autograd would not let anybody change it in place
            output = output.data
        if self.reads is not None:
            self.reads.update(*[one.source.reads for one in kept if isinstance(one, Saved)])
        return _function(name).apply([output], backward, kept, *inputs)

    @contextmanager
    def region(self, again: bool = False) -> Iterator[None]:
        """A piece that is run again on its own, and intercepted there too, so nothing known before it may be used in it. again:
        whether the re-run recomputes all that it keeps."""
        outer = self.provenance, self.saver
        self.provenance, self.saver = Provenance(self.mode, self.plan, _is_checkpointed if again else None), _saver()
        try:
            yield
        finally:
            self.provenance, self.saver = outer

    @contextmanager
    def again(self) -> Iterator[None]:
        """As `region`, for the re-run. Autograd does not check versions of the tensors that it gives back then.

        Raises: RuntimeError if backward would read a tensor that was written to meanwhile.
        """
        self.reads = reads = set[Read]()
        with self.region():
            try:
                yield
            finally:
                if any(one.changed for one in reads):
                    raise RuntimeError(
                        "a tensor that is read in backward was modified by an inplace operation in a block that is run again; "
                        "expected a copy of it there, or that block without gradient checkpointing"
                    )

    @property
    def is_beyond(self) -> bool:
        """Whether torch's checkpointing is running, for the first time or again, a piece whose re-run is not intercepted."""
        saver = _saver()
        if saver is None or saver is self.saver:
            return False
        return _name(saver).startswith(("_checkpoint_hook.", "_recomputation_hook."))


def _is_checkpointed() -> bool:
    """Whether what autograd saves now is thrown away: torch's own checkpointing recomputes it before it is read."""
    return _name(_saver()).startswith("_checkpoint_hook.")


def _saver() -> Any:
    """The hook that receives what autograd saves now, or None."""
    hooks = _top_hooks(True)
    return None if hooks is None else hooks[0]


def _name(hook: Any) -> str:
    return getattr(hook, "__qualname__", "")


_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignores_tracing: None)


class FrozenBackward(TorchFunctionMode):
    """Passes calls of the torch functions that keep much to their handlers: (run, call, *args, **kwargs) → output."""

    def __init__(self, run: Run, handlers: dict[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.run, self.handlers = run, handlers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = None if torch.compiler.is_dynamo_compiling() else self.handlers.get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if not torch.is_grad_enabled() or "out" in kwargs or self.run.is_beyond:
            return func(*args, **kwargs)
        return handler(self.run, functools.partial(func, *args, **kwargs), *args, **kwargs)


class _Kept(torch.autograd.Function):
    """A function that has run already. Only how to rebuild values from what was saved, and its backward, are kept on ctx."""

    @staticmethod
    def forward(ctx: Any, output: list[Tensor], backward: Backward, kept: tuple[Kept, ...], *inputs: Tensor) -> Tensor:
        ctx.program, tensors = compiled(kept)
        ctx.gradients = backward
        ctx.save_for_backward(*tensors)
        return output[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        if not torch.is_grad_enabled():
            return _gradients(ctx, gradient)
        return _once(ctx, gradient if gradient.requires_grad else gradient.detach().requires_grad_())


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    with without_autocast(gradient):
        values = tensors if ctx.program is None else ctx.program.values(tensors)
        return None, None, None, *ctx.gradients(gradient, ctx.needs_input_grad[3:], *values)


# More expensive, and only for a backward with create_graph: if the gradient requires grad, it refuses a second derivative.
_once = once_differentiable(_gradients)


@functools.cache
def _function(name: str) -> Any:
    """One class per name, so that autograd graphs and counters tell them apart."""
    return type(name, (_Kept,), {})


def autocasts(tensor: Tensor) -> bool:
    kind = tensor.device.type
    return _can_autocast(kind) and torch.is_autocast_enabled(kind)


_can_autocast = functools.cache(torch.amp.is_autocast_available)


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else _AS_IT_IS


_AS_IT_IS = nullcontext()
