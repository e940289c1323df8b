"""What applies while one call of a pipeline, or one `guided` block, is running: its schedule, and what was computed for it.

Nothing that the engine computes ahead outlives its scope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from agd_fast.attaching.find import uncompiled

SCOPE = "_agd_scope"


@dataclass(eq=False)
class Guidance:
    """ω and the adapter's factor at every step: [T, B] and [T] float32 on the denoiser's device.

    first: index of the scheduler's timestep at the first step. numbers: 0 … T − 1 [T] float32, on the same device.
    step: number of the current step.
    """

    omegas: Tensor
    gates: Tensor
    numbers: Tensor
    first: int
    step: int = 0

    @property
    def now(self) -> tuple[Tensor, Tensor]:
        """ω [B] and the factor [1] of the current step."""
        return self.omegas[self.step], self.gates[self.step : self.step + 1]

    @property
    def number(self) -> Tensor:
        """The number of the current step, [1]."""
        return self.numbers[self.step : self.step + 1]


@dataclass(eq=False)
class Scope:
    """timesteps: those of its schedule [T], in the scheduler's convention, asked for at the first forward; None if there is no
    schedule. watched: whether the caller's own code runs between its forwards. own_times: whether a t of [B] may differ between
    samples, which no pipeline passes. guidance: given if ω or the adapter's factor changes from step to step. looked: whether
    the engine has looked at the model in this scope. plain: whether the engine leaves all further forwards alone. store: what
    the engine keeps for this scope."""

    timesteps: Callable[[], Tensor] | None = None
    watched: bool = True
    own_times: bool = True
    guidance: Guidance | None = None
    looked: bool = False
    plain: bool = False
    store: dict[Any, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a denoiser are outside of the scope


@contextmanager
def in_scope(denoiser: nn.Module, scope: Scope) -> Iterator[Scope]:
    """Inside, `scope` is the denoiser's scope."""
    module = uncompiled(denoiser)
    previous = vars(module).get(SCOPE)
    vars(module)[SCOPE] = scope
    try:
        yield scope
    finally:
        if previous is None:
            vars(module).pop(SCOPE, None)
        else:
            vars(module)[SCOPE] = previous


def optimized(model: Any) -> list[nn.Module]:
    """The denoisers of a model whose calls go through the engine."""
    modules = [model] if isinstance(model, nn.Module) else [one for one in vars(model).values() if isinstance(one, nn.Module)]
    found = dict.fromkeys(uncompiled(module) for module in modules)
    return [module for module in found if getattr(module._compiled_call_impl, "takes_scopes", False)]


def scope_of(denoiser: nn.Module) -> Scope | None:
    return vars(denoiser).get(SCOPE)


@contextmanager
def scoped(
    model: Any, timesteps: Callable[[], Tensor] | Tensor | None = None, *, watched: bool = True, own_times: bool = True
) -> Iterator[None]:
    """One run of a schedule, for which optimized denoisers may compute ahead: what is known for all steps is computed once for
    the same conditions.

    timesteps: the scheduler's [T], or a function that returns them at the first forward. watched: whether code that may change
    the model runs between the forwards; if none does, False saves a look at the model in each step. own_times: whether a t of
    [B] may differ between samples; if it does not, False saves a look at its values in each step, which waits for the device.
    """
    times = (lambda: timesteps) if isinstance(timesteps, Tensor) else timesteps
    with ExitStack() as stack:
        for denoiser in optimized(model):
            stack.enter_context(in_scope(denoiser, Scope(times, watched, own_times)))
        yield
