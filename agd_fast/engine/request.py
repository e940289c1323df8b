"""One call of a denoiser, taken apart: which of its tensors are ω, x_t and t, and what its captured form depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from agd_fast.adapters.base import Ahead
from agd_fast.attaching.arming import armed
from agd_fast.attaching.attachment import Attachment
from agd_fast.attaching.scope import Guidance
from agd_fast.attaching.timesteps import ways_to_pass
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.tables import Rows
from agd_fast.graph.levels import Level
from agd_fast.spec import DenoiserSpec

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class Request:
    """call: the denoiser's own call. sample, time: the arguments x_t (a tensor, or a list of them) and t. attachment: None if
    there is no adapter. guidance: None unless ω or the adapter's factor changes from step to step.

    inputs: the tensors of the call; before them, where the adapter is armed, ω and, where there is a guidance, the adapter's
    factor. levels: those of the inputs, as far as the call tells. timestep: which input is t. key: all that a program is made
    for. obstacle: why there can be no program, or empty.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sample: Any
    time: Any
    attachment: Attachment | None
    guidance: Guidance | None
    config: EngineConfig

    def __post_init__(self) -> None:
        self.leaves, self.tree = pytree.tree_flatten((self.args, self.kwargs))
        self.inputs: list[Tensor] = []
        self.levels: list[Level] = []
        if self.guidance is not None:
            self.inputs, self.levels = list(self.guidance.now), [Level.STEP, Level.STEP]
        elif self.attachment is not None and self.attachment.omega is not None and self.attachment.active:
            self.inputs, self.levels = [self.attachment.omega], [Level.STATIC]
        self.armed = len(self.inputs)
        self.timestep, self.obstacle = -1, ""
        self.samples = pytree.tree_leaves(self.sample)
        shapes = [tuple(tensor.shape) for tensor in self.inputs]
        self.key = (self.tree, *shapes, *[self._take(leaf) for leaf in self.leaves])
        if self.timestep < 0 and not self.obstacle:
            self.obstacle = f"its timestep is a {type(self.time).__name__}; expected a tensor"

    def _take(self, leaf: Any) -> Any:
        """Note one argument. Returns its part of the key."""
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _PLAIN):
                self.obstacle = f"it is called with a {type(leaf).__name__}, of which nobody can tell whether it changed"
                return None
            return type(leaf), leaf
        if leaf is self.time:
            self.timestep = len(self.inputs)
            self.levels.append(Level.STEP)
            leaf = leaf.to(self.samples[0].device)  # there the rows of the table are found by it
        else:
            self.levels.append(Level.MOVING if any(leaf is one for one in self.samples) else Level.STATIC)
        self.inputs.append(leaf)
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device

    def has_several_times(self, own_times: bool) -> bool:
        """Whether t differs between tokens or frames of a sample or, with `own_times`, between samples. Waits for the device
        where it may differ, unless t is an expanded number."""
        time = self.time
        alone = 1 if own_times else len(self.sample)
        return time.numel() > alone and any(time.stride()) and bool((time != time.flatten()[0]).any())

    def function(self, *tensors: Tensor) -> list[Tensor]:
        """The call as a function of `inputs`. Returns the tensors of its output."""
        own, given = tensors[: self.armed], iter(tensors[self.armed :])
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        if self.attachment is None:
            return pytree.tree_leaves(self.call(*args, **kwargs))
        omega, gate = (*own, None, None)[:2]
        ahead = Ahead(self.samples[0].dtype, self.config.absorb) if self.config.hoist else None
        with armed(self.attachment, omega, gate, ahead=ahead):
            return pytree.tree_leaves(self.call(*args, **kwargs))

    def rows(self, timesteps: Tensor, spec: DenoiserSpec) -> Rows | None:
        """Rows for all t and numbers of a step; None where t is none of the scheduler's timesteps [T]. Waits for the device."""
        t, guidance = self.inputs[self.timestep], self.guidance
        ways = [way.tolist() for way in ways_to_pass(timesteps, spec, t)]
        if not ways:
            return None
        steps = range(len(timesteps)) if guidance is None else range(guidance.first, guidance.first + len(guidance.gates))
        pairs = [(way[step], step - steps.start) for step in steps for way in ways]
        if guidance is None:  # steps at the same t are the same
            pairs = [(time, 0) for time, _ in pairs]
        times, numbers = zip(*dict.fromkeys(pairs), strict=True)
        return Rows(torch.tensor(times, dtype=t.dtype), torch.tensor(numbers), guidance is not None)

    def steps(self, rows: Rows) -> Mapping[int, Tensor]:
        """Values [R, …] of the inputs that change with the step, by index."""
        t = self.inputs[self.timestep]
        found = {self.timestep: rows.times.to(t.device).view(-1, *[1] * t.ndim).expand(-1, *t.shape)}
        if self.guidance is not None:
            numbers = rows.numbers.to(self.guidance.gates.device)
            found |= {0: self.guidance.omegas[numbers], 1: self.guidance.gates[numbers, None]}
        return found
