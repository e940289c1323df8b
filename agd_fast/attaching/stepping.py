"""The steps of one call of a pipeline with adapters: the ω of each denoiser at each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.attaching.arming import armed, warn_outside
from agd_fast.attaching.attachment import require_attachment
from agd_fast.attaching.find import components_of, uncompiled
from agd_fast.attaching.scales import Given
from agd_fast.attaching.scope import Guidance, scope_of
from agd_fast.attaching.steps import around_step, before_forward, number_of_steps
from agd_fast.attaching.timesteps import position_of
from agd_fast.forward import device_of
from agd_fast.spec import DenoiserSpec

Interval = tuple[float, float]


def arm(stack: ExitStack, pipe: Any, scales: Mapping[str, Given], spec: DenoiserSpec, interval: Interval | None) -> Steps:
    """Until `stack` exits, each step of the pipeline has its ω. Raises: ValueError if what an adapter acts on was replaced."""
    components = components_of(pipe, spec)
    placed = [_Placed(component, scales[name]) for name, component in components.items()]
    for one in placed:
        one.attachment.require_sites(uncompiled(one.component))
        stack.enter_context(armed(one.attachment, one.omega))
    steps = Steps(pipe, placed, interval)
    for component in components.values():
        stack.enter_context(before_forward(component, steps.forward))
    stack.enter_context(around_step(pipe.scheduler, steps.step))
    return steps


class _Placed:
    """A denoiser with an adapter, and its ω; None means the base."""

    def __init__(self, component: nn.Module, given: Given) -> None:
        self.component, self.given = component, given
        self.attachment = require_attachment(component)
        self.guidance: Guidance | None = None  # given if ω and the adapter's factor are laid out for all steps
        omega = given.omega()
        self.omega = omega.to(device_of(component)) if given.varies else self._checked(omega)

    def _checked(self, omega: Tensor) -> Tensor | None:
        if (omega == 1).all():
            return None
        warn_outside(omega, self.attachment.adapter.config)
        return omega.to(device_of(self.component))

    def plan(self, first: int, fractions: list[float], gates: list[float]) -> None:
        """Lay out ω and the adapter's factor for all steps. first: index of the scheduler's timestep at the first step."""
        if self.omega is None:
            return
        omegas = torch.stack([self.given.omega(fraction) for fraction in fractions])
        if self.given.varies:
            warn_outside(omegas, self.attachment.adapter.config)
        device = device_of(self.component)
        numbers = torch.arange(len(omegas), dtype=torch.float32)
        self._lay_out(Guidance(omegas.to(device), torch.tensor(gates).to(device), numbers.to(device), first))

    def at(self, step: int, acts: bool) -> None:
        omega = self.omega
        if self.guidance is not None:
            self.guidance.step = step
            omega = self.guidance.omegas[step]
        self.attachment.omega = omega if acts else None

    def change(self, value: Any) -> None:
        """Use another scale from the next forward on."""
        self.given = Given(self.given.argument, value, self.given.rows)
        self.attachment.omega = self.omega = self._checked(self.given.rows(value))
        self._lay_out(None)

    def _lay_out(self, guidance: Guidance | None) -> None:
        self.guidance = guidance
        if (scope := scope_of(uncompiled(self.component))) is not None:
            scope.guidance = guidance


class Steps:
    """Checks that there is one forward per step, and sets what changes from step to step: ω, and whether the adapters act."""

    def __init__(self, pipe: Any, placed: list[_Placed], interval: Interval | None) -> None:
        self.pipe, self.placed, self.interval = pipe, placed, interval
        self.varies = interval is not None or any(one.given.varies for one in placed)
        self.times: Tensor | None = None  # the scheduler's timesteps that the steps are laid out for
        self.firsts: list[int] = []  # for each step, the first step at the same timestep
        self.acts: list[bool] = []
        self.done, self.called = 0, False

    def change(self, argument: str, value: Any) -> None:
        """Use another scale from the next step on; one that ends the first denoiser's guidance ends that of all."""
        first = self.placed[0]
        for one in self.placed:
            ended = argument == first.given.argument and first.given.is_off
            if ended or argument == one.given.argument:
                one.change(value)

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.called:
            raise RuntimeError(
                "the pipeline called a denoiser twice in one step while its adapter was armed (double guidance); expected one "
                "forward a step: this pipeline needs agd_fast.disabled(pipe), or guides in a way that adapters do not know"
            )
        self.called = True
        if self.varies:
            if self.times is not self.pipe.scheduler.timesteps:  # FreeInit goes through several schedules
                self._plan(args, kwargs)
            step = self._same(self.done)
            for one in self.placed:
                one.at(step, self.acts[step])

    def step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.called = False
        self.done += 1
        return step(*args, **kwargs)

    def _same(self, step: int) -> int:
        return self.firsts[min(step, len(self.firsts) - 1)]

    def _plan(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.times, self.done = self.pipe.scheduler.timesteps, 0
        total, times = number_of_steps(self.pipe), self.times
        attachment = self.placed[0].attachment
        first = position_of(times, attachment.spec, torch.as_tensor(attachment.argument(attachment.spec.timestep, args, kwargs)))
        first = len(times) - total if first is None else first  # image-to-image makes the last steps only
        times = times[first : first + total].tolist()
        self.firsts = [times.index(time) for time in times]
        total = len(times)
        start, stop = self.interval or (0.0, 1.0)
        self.acts = [int(start * total) <= step < int(stop * total) for step in range(total)]
        for one in self.placed:
            one.plan(first, [same / total for same in self.firsts], [float(self.acts[same]) for same in self.firsts])
