"""The compared ways to make one sampling step, on a denoiser that is called in a bare loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import agd_fast as agd
from agd_fast import AdapterConfig
from agd_fast.attaching import scoped
from agd_fast.engine import engine_of
from agd_fast.engine.graphs import GraphedStep
from agd_fast.families import find_spec
from agd_fast.forward import nest
from agd_fast.ops import kernels_info
from speed.architectures import Architecture, build
from speed.counting import Counts, counting
from speed.reference import ReferenceAdapters

UNFUSED = agd.EngineConfig(compile=False, graph=False, kernels="never")  # runs operation by operation, so that it can be counted
OPTIMIZED = agd.EngineConfig()


@dataclass(frozen=True)
class Kind:
    """The kind of an arm.

    plain: the unoptimized arm that gives the same. engine: how it is optimized; None where it is not. torch_compiled: whether the
    denoiser goes through torch.compile instead.
    """

    what: str
    method: Literal["unguided", "cfg", "agd"]
    plain: str | None = None
    engine: agd.EngineConfig | None = None
    torch_compiled: bool = False

    @property
    def compiled(self) -> bool:
        """Whether making it needs a lengthy compilation."""
        return self.torch_compiled or (self.engine is not None and self.engine.compile is not False)


_COMPILED = "the same through torch.compile(fullgraph=True) and, on CUDA, a CUDA graph of the whole step"
_WHOLE = "the same, the step compiled as a whole and not by blocks that repeat"
_KERNELS = "our adapter, optimized, with every Triton kernel, not only those that win; timed on CUDA alone"
ARMS = {
    "unguided": Kind("the base in one pass, eager diffusers", "unguided"),
    "cfg": Kind("the base in a doubled batch, eager diffusers", "cfg"),
    "cfg_compiled": Kind(_COMPILED, "cfg", "cfg", torch_compiled=True),
    "unguided_engine": Kind("the base in one pass, optimized", "unguided", "unguided", OPTIMIZED),
    "cfg_engine": Kind("the base in a doubled batch, optimized", "cfg", "cfg", OPTIMIZED),
    "agd_naive": Kind("the reference's adapters: embedders at every block, all of it in every step", "agd"),
    "agd": Kind("our adapter, not optimized", "agd"),
    "agd_hoisted": Kind("our adapter, optimized, with neither compilation nor CUDA graph", "agd", "agd", UNFUSED),
    "agd_engine": Kind("our adapter, optimized", "agd", "agd", OPTIMIZED),
    "agd_engine_whole": Kind(_WHOLE, "agd", "agd", replace(OPTIMIZED, repeated_blocks=False)),
    "agd_kernels": Kind(_KERNELS, "agd", "agd", replace(OPTIMIZED, kernels="always")),
}

Step = Callable[[Tensor, Tensor], Tensor]  # x_t [B, ...], t [1] → prediction [B, ...]


@dataclass(frozen=True)
class Arm:
    """One way to make a step.

    denoiser: what the step calls, uncompiled. scope: the context of one run of the schedule. passes: evaluations per sample and
    step. weight_bytes: of all parameters that a step reads. adapter: how ours was configured, where there is one.
    """

    denoiser: nn.Module
    step: Step
    passes: int
    weight_bytes: int
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext
    adapter: AdapterConfig | None = None


class Workbench:
    """A denoiser with random weights, one batch of inputs, and the arms on it.

    kind: of our adapter; None takes the backbone's default. omega: the guidance scale. reference: the paper's own code.
    counted: whether arms are made to be counted, so that nothing is compiled. compiled: whether the engine compiles.
    """

    def __init__(
        self,
        architecture: Architecture,
        batch: int,
        steps: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kind: str | None = None,
        omega: float = 5.0,
        reference: ReferenceAdapters | None = None,
        counted: bool = False,
        compiled: bool = True,
        denoiser: nn.Module | None = None,
    ) -> None:
        self.architecture, self.batch, self.device, self.dtype = architecture, batch, device, dtype
        self.kind, self.omega, self.reference = kind, omega, reference
        self.counted, self.compiled = counted, compiled
        self.denoiser = build(architecture, device, dtype) if denoiser is None else denoiser
        self.spec = find_spec(self.denoiser)
        self.x = torch.randn(batch, *architecture.sample, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        self.schedule = architecture.timesteps(steps)
        unit = architecture.time_unit
        self.times = (self.schedule if unit == 1 else self.schedule.to(dtype) / unit).to(device)[:, None]  # [T, 1]
        self.cond = architecture.inputs(batch, device, dtype, seed=1)
        null = architecture.inputs(batch, device, dtype, seed=0)
        self.doubled = {name: torch.cat([null[name], value]) for name, value in self.cond.items()}

    def arm(self, name: str) -> Arm:
        """Raises: ValueError for an unknown arm."""
        require_arms([name])
        kind, denoiser = ARMS[name], shared_copy(self.denoiser)
        if kind.method == "agd":
            return self._adapted(name, denoiser)
        passes = 2 if kind.method == "cfg" else 1
        scope: Callable[[], AbstractContextManager[Any]] = nullcontext
        if kind.engine is not None:
            agd.optimize(denoiser, engine_config(kind.engine, counted=self.counted, compiled=self.compiled))
            scope = self._scope(denoiser)
        call: Any = denoiser
        if kind.torch_compiled and not self.counted:
            call = torch.compile(denoiser, fullgraph=True, dynamic=False)
        step = self._cfg(call) if passes == 2 else self._plain(call)
        if kind.torch_compiled and self.device.type == "cuda":
            step = _graphed(step, self.x, self.times[0])
        return Arm(denoiser, step, passes, weight_bytes(denoiser), scope)

    def run(self, arm: Arm, steps: int | None = None) -> Tensor:
        """One run of the whole schedule, or of its last steps, on the same x_t at every step; returns the last prediction."""
        with torch.no_grad(), arm.scope():
            for time in self.times[-(steps or len(self.times)) :]:
                prediction = arm.step(self.x, time)
        return prediction

    def count(self, arm: Arm) -> Counts:
        """The counts of one run of the schedule. Its first two steps hold what is computed ahead; the others equal the third."""
        with torch.no_grad():
            if engine_of(arm.denoiser) is not None:
                with arm.scope():
                    arm.step(self.x, self.times[0])  # the step in which the engine captures
            with ExitStack() as stack:
                with counting(self.device.type) as total:
                    stack.enter_context(arm.scope())
                for time in self.times[:3]:
                    with counting(self.device.type) as last:
                        arm.step(self.x, time)
                    total = total + last
        return total + last * (len(self.times) - len(self.times[:3]))

    def _adapted(self, name: str, denoiser: nn.Module) -> Arm:
        if name == "agd_naive" and self.reference is not None:
            return self._reference(self.reference, denoiser)
        config = AdapterConfig(kind=self.kind)
        if name == "agd_naive":
            config = reference_config(self.kind, self.architecture.reference_hidden)
        torch.manual_seed(0)  # so that arms with the same adapter agree
        adapter = agd.attach(denoiser, config)
        randomise_zeros(adapter)
        if name == "agd_naive":
            adapter.to(self.dtype)  # as in its own code
        if (engine := ARMS[name].engine) is not None:
            agd.optimize(denoiser, engine_config(engine, counted=self.counted, compiled=self.compiled))
        size = weight_bytes(denoiser) + weight_bytes(adapter)
        return Arm(denoiser, self._plain(denoiser), 1, size, self._scope(denoiser, armed=True), adapter.config)

    def _reference(self, reference: ReferenceAdapters, denoiser: nn.Module) -> Arm:
        adapted = reference.inject(denoiser, self.spec, self.cond, self.kind, self.architecture.reference_hidden)
        randomise_zeros(denoiser)
        omega = torch.full((self.batch,), self.omega, device=self.device)
        adapted.condition(omega, self.cond)
        plain = self._plain(denoiser)

        def step(x: Tensor, time: Tensor) -> Tensor:
            adapted.at(time.expand(self.batch))
            return plain(x, time)

        return Arm(denoiser, step, 1, weight_bytes(denoiser))

    def _scope(self, denoiser: nn.Module, armed: bool = False) -> Callable[[], AbstractContextManager[Any]]:
        def enter() -> AbstractContextManager[Any]:
            stack = ExitStack()
            stack.enter_context(scoped(denoiser, self.schedule, watched=False, own_times=False))
            if armed:
                stack.enter_context(agd.guided(denoiser, self.omega))
            return stack

        return enter

    def _plain(self, call: Any) -> Step:
        arguments = {**nest(self.cond), **self.architecture.constants(self.batch)}
        return lambda x, time: self._call(call, x, time, arguments)

    def _cfg(self, call: Any) -> Step:
        """As diffusers' pipelines do it: the conditions are doubled once, x_t at every step."""
        arguments = {**nest(self.doubled), **self.architecture.constants(2 * self.batch)}

        def step(x: Tensor, time: Tensor) -> Tensor:
            both = self._call(call, torch.cat([x, x]), time, arguments)
            uncond, cond = both[:, : self.architecture.guided].chunk(2)
            return uncond + self.omega * (cond - uncond)

        return step

    def _call(self, call: Any, x: Tensor, time: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        own = {self.spec.sample: x, self.spec.timestep: time.expand(len(x))}
        return call(**own, **arguments, return_dict=False)[0]


def require_arms(names: Iterable[str]) -> None:
    """Raises: ValueError that lists the arms that exist."""
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"expected arms of {', '.join(ARMS)}; found {', '.join(map(repr, unknown))}")


def engine_config(engine: agd.EngineConfig, *, counted: bool = False, compiled: bool = True) -> agd.EngineConfig:
    """The config of an optimized arm. Which kernels would win is unknown without a GPU, so counts are with none or with all."""
    if counted:
        return replace(UNFUSED, kernels="always" if engine.kernels == "always" else "never")
    return engine if compiled else replace(engine, compile=False)


def untimed(name: str, device: torch.device) -> str:
    """Why an arm has no times on this device; empty if it has."""
    engine = ARMS[name].engine
    if engine is None or engine.kernels != "always":
        return ""
    missing = kernels_info()["missing"] or ("" if device.type == "cuda" else f"tensors on {device.type}")
    return f"not timed: its kernels do not run ({missing})" if missing else ""


def shared_copy(denoiser: nn.Module) -> nn.Module:
    """A copy of the denoiser's modules around the same weights: nothing else is shared."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    return copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})


def note_of(denoiser: nn.Module) -> str | None:
    """Why the engine, if any, does not run for a denoiser that has been called; None if it does."""
    reasons = (agd.info(denoiser)["engine"] or {}).get("plain_because")
    return f"not optimized: {'; '.join(reasons)}" if reasons else None


def reference_config(kind: str | None, hidden: int) -> AdapterConfig:
    """The reference's adapter that is nearest to this kind of ours."""
    return AdapterConfig(
        kind="reference_offset" if kind == "offset" else "reference_cross_attention",
        hidden=hidden,
        omega_features="fourier",
        identity_at_one=False,
    )


def randomise_zeros(module: nn.Module) -> None:
    """Fills zero parameters with random values: a fresh adapter multiplies by zeros, for which a GPU draws less power."""
    random = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if not parameter.is_meta and not parameter.any():
            with torch.no_grad():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=random))


def weight_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in module.parameters())


def _graphed(step: Step, x: Tensor, time: Tensor) -> Step:
    with torch.no_grad():
        graph = GraphedStep(lambda moving, kept: [step(*moving)], x.device, [x, time], [])
    return lambda x, time: graph([x, time], [])[0]
