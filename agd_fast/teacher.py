"""The frozen model to distil, and the one place where classifier-free guidance is computed."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast import ops
from agd_fast.attaching import Attachment, armed, attachment_of, component_of, denoiser_of, disabled
from agd_fast.families import find_spec
from agd_fast.files import fingerprint
from agd_fast.forward import device_of, nest
from agd_fast.freezing import frozen
from agd_fast.schedule import integrate, prediction_type_of, visit_noised
from agd_fast.sites import config_value, label_count
from agd_fast.spec import DenoiserSpec

Conditions = Mapping[str, Tensor]
Guidance = Callable[[Tensor, Tensor, Tensor], Tensor]  # ε(∅), ε(c) [B, C, ...], ω [B] → guided prediction [B, C, ...]


@dataclass(frozen=True)
class State:
    """One step of guided trajectories: x_t [B, C, ...], t [B], and the guided prediction there.

    conditions: arguments of the conditional call, batch first.
    constants: further arguments of that call, the same for every sample.
    cond: returns ε(c), the conditional prediction of the base.
    """

    sample: Tensor
    timestep: Tensor
    conditions: Conditions
    target: Tensor
    cond: Callable[[], Tensor]
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> Conditions:
        """All arguments but x_t and t, as `Teacher.predict` takes them."""
        return {**self.conditions, **self.constants}


Visit = Callable[[State], Tensor]  # → the prediction [B, C, ...] that the trajectory goes on with


@dataclass
class Teacher:
    """A denoiser, its scheduler, and what AGD must know about them.

    denoiser: a diffusers denoiser, or any nn.Module that `spec` describes. It is kept in eval mode.
    scheduler: a diffusers scheduler.
    spec: None finds the entry of a known diffusers class.
    null_condition: the unconditional value by argument, with batch 1, if the spec has none (a text model's empty prompt).
    sample_shape: shape of one sample (C, H, W); None reads it off the denoiser's config.
    name: identifies the model for a reader; stored with adapters and trajectories.
    guidance: the rule to distil, (ε(∅), ε(c), ω) → guided prediction; plain CFG unless given. Adapters with identity_at_one
        assume that it gives ε(c) at ω = 1.

    Raises: TypeError for an unknown class without a spec; ValueError for contradictory prediction types.
    """

    denoiser: nn.Module
    scheduler: Any
    spec: DenoiserSpec = None  # type: ignore[assignment]
    null_condition: Mapping[str, Tensor] = field(default_factory=dict)
    sample_shape: tuple[int, ...] = ()
    name: str = ""
    guidance: Guidance = ops.guidance_combine

    gives_cond_at_one = True  # whether the rule goes to ε(c) as ω goes to 1
    one_scale_a_run = False  # whether the trajectories of a run share their ω
    run_size = 50  # trajectories at once
    validation_runs = 50  # held-out trajectories per scale
    guidance_range = (1.0, 6.0)  # of ω, if the caller does not choose it
    guides_above = -math.inf  # the ω at and below which there is no target

    def __post_init__(self) -> None:
        self._call = self.denoiser  # compiled, if that is what was given
        self.denoiser = denoiser_of(self.denoiser)
        self.spec = self.spec or find_spec(self.denoiser)
        self.denoiser.eval()
        if not hasattr(self.scheduler, "set_timesteps"):
            raise TypeError(f"expected a diffusers scheduler beside the denoiser, found {type(self.scheduler).__name__}")
        found = self.prediction_type
        if self.spec.prediction_type not in (None, found):
            raise ValueError(f"the spec says prediction_type={self.spec.prediction_type!r}, the scheduler has {found!r}")
        self.sample_shape = tuple(self.sample_shape) or _sample_shape(self.denoiser)
        self.name = self.name or str(getattr(self.denoiser, "name_or_path", "") or type(self.denoiser).__name__)
        parameters = inspect.signature(self.denoiser.forward).parameters
        self._extra = {"return_dict": False} if "return_dict" in parameters else {}
        missing = [
            name
            for name in (self.spec.sample, self.spec.timestep, *(c.argument.split(".")[0] for c in self.spec.conditions))
            if name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        ]
        if missing:
            raise ValueError(
                f"the spec names the arguments {missing}, but {type(self.denoiser).__name__}.forward takes {list(parameters)}"
            )

    @property
    def owner(self) -> Any:
        """The object that a user holds: this teacher, or the pipeline that it stands for."""
        return self

    @property
    def about(self) -> dict[str, Any]:
        """What a reader of an adapter may want to know about the model."""
        return {}

    @property
    def prediction_type(self) -> str:
        return prediction_type_of(self.scheduler)

    @property
    def device(self) -> torch.device:
        return device_of(self.denoiser)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that it computes in: that of its first floating-point weight; quantised weights are integer codes."""
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())

    def to(self, device: torch.device) -> None:
        self.denoiser.to(device)

    @property
    def guided_channels(self) -> int | None:
        return config_value(self.denoiser, self.spec.guided_channels)

    @property
    def guidance_name(self) -> str:
        """A name that tells this guidance rule from any other, for the folders that hold what it made: module and name of a
        function, with the arguments of a functools.partial; the repr of any other object.

        Raises: ValueError for a rule without such a name, such as a lambda or a closure.
        """
        name = _rule_name(self.guidance)
        if "<" in name:
            raise ValueError(
                "expected a guidance rule that a name tells from others: a function of a module, a functools.partial of one, or "
                f"an object whose repr holds its settings (a dataclass with __call__); found {name}"
            )
        return name

    def conditions(
        self, class_labels: Sequence[int] | Tensor | int | None = None, conditions: Conditions | None = None
    ) -> dict[str, Tensor]:
        """One table of conditions, batch first, from labels or from tensors by argument name.

        Raises: ValueError if a condition that the denoiser needs is missing, unknown or of another length.
        """
        table = {name: torch.as_tensor(value) for name, value in (conditions or {}).items()}
        if class_labels is not None:
            labels = torch.as_tensor(class_labels if isinstance(class_labels, Tensor | int) else list(class_labels))
            if labels.is_floating_point() and labels.numel():
                raise ValueError(f"class_labels must be integers, found {labels.tolist()}")
            table[self._label_argument()] = labels.long().reshape(-1)
        needed = [condition.argument for condition in self.spec.adapted]
        known = [condition.argument for condition in self.spec.conditions]
        missing, unknown = sorted(set(needed) - set(table)), sorted(set(table) - set(known))
        if missing or unknown:
            raise ValueError(
                f"expected the conditions {needed} of {type(self.denoiser).__name__}; "
                f"missing {missing or 'none'}, unknown {unknown or 'none'}"
            )
        lengths = {name: len(value) for name, value in table.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ValueError(f"expected conditions of one positive length, found {lengths}")
        for condition in self.spec.conditions:
            value, count = table.get(condition.argument), label_count(self.denoiser, condition)
            if value is not None and count is not None and not ((value >= 0) & (value < count)).all():
                raise ValueError(f"{condition.argument} must lie in 0..{count - 1}; found {int(value.min())}..{int(value.max())}")
        return table

    def fingerprints(self, table: Conditions) -> dict[str, str]:
        """Hashes of the content of a table of conditions, by name."""
        return {name: fingerprint({name: value}) for name, value in table.items()}

    def _label_argument(self) -> str:
        names = [condition.argument for condition in self.spec.conditions if condition.adapt]
        if "class_labels" in names or len(names) != 1:
            return "class_labels"
        return names[0]

    def null(self, conditions: Conditions) -> dict[str, Tensor]:
        """The unconditional values ∅ for the same batch as `conditions`.

        Raises: ValueError naming a condition whose null value was not given.
        """
        table = {}
        for condition in self.spec.conditions:
            name = condition.argument
            if name not in conditions:
                continue
            like = conditions[name]
            value = self.null_condition.get(name)
            if value is not None:
                table[name] = value.to(like).expand_as(like)
            elif condition.null == "same":
                table[name] = like
            elif condition.null is not None:
                table[name] = torch.full_like(like, config_value(self.denoiser, condition.null))
            else:
                raise ValueError(
                    f"the null value of {name!r} is unknown; expected Teacher(..., null_condition={{{name!r}: tensor}})"
                )
        return table

    def placed(self, conditions: Conditions) -> dict[str, Tensor]:
        """`conditions` on the denoiser's device, floating-point ones in its dtype; tensors that already are so are not copied."""
        device, dtype = self.device, self.dtype
        return {n: value.to(device, dtype if value.is_floating_point() else value.dtype) for n, value in conditions.items()}

    def doubled(self, conditions: Conditions) -> dict[str, Tensor]:
        """The conditions [2B, ...] of a doubled batch [∅, c]."""
        null = self.null(conditions)
        return {name: torch.cat([null[name], value]) for name, value in conditions.items()}

    def predict(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One forward pass of the denoiser, guided channels only: x [B, C, ...], t [B] → [B, C', ...]."""
        conditions = self.placed(conditions)
        arguments = {self.spec.sample: x, self.spec.timestep: timestep, **nest(conditions), **self._extra}
        output = self._call(**arguments)
        prediction = output if isinstance(output, Tensor) else output[0]
        return prediction[:, : self.guided_channels]

    def predict_cfg(
        self, x: Tensor, timestep: Tensor, conditions: Conditions, omega: Tensor, doubled: Conditions | None = None
    ) -> tuple[Tensor, Tensor]:
        """(ε_cfg, ε(c)) from one forward pass of the base over a doubled batch [∅, c]. ε_cfg is what the teacher's guidance rule
        makes of the two predictions.

        omega: [B], standard convention.
        doubled: `self.doubled(conditions)`, for loops that have it already.
        Raises: RuntimeError if an adapter is armed.
        """
        self.refuse_armed()
        doubled = self.doubled(conditions) if doubled is None else doubled
        uncond, cond = self.predict(torch.cat([x, x]), torch.cat([timestep, timestep]), doubled).chunk(2)
        return self.guidance(uncond, cond, omega.to(x.device)), cond

    def predict_agd(self, x: Tensor, timestep: Tensor, conditions: Conditions, omega: Tensor) -> Tensor:
        """ε̂_agd from one forward pass with the attached adapter; omega: [B], standard convention.

        Raises: ValueError if there is no adapter to use.
        """
        with armed(self.require_adapter("predict_agd"), omega):
            return self.predict(x, timestep, conditions)

    def arguments_on_meta(self, conditions: Conditions, count: int) -> dict[str, Any]:
        """Arguments of a forward pass of `count` samples or more, by (dotted) name, as shapes without values."""
        meta = torch.device("meta")
        first = self.placed({name: value[:1] for name, value in conditions.items()})
        rows = {name: value.to(meta).expand(count, *value.shape[1:]) for name, value in first.items()}
        sample = torch.empty(count, *self.sample_shape, device=meta, dtype=self.dtype)
        return {self.spec.sample: sample, self.spec.timestep: torch.zeros(count, device=meta), **rows}

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """What `count` trajectories start from, [count, ...]: here noise."""
        return torch.randn(count, *self.sample_shape, generator=generator)

    def run(
        self,
        conditions: Conditions,
        start: Tensor,
        omega: Tensor,
        steps: int,
        visit: Visit,
        *,
        generator: torch.Generator,
        noised: bool = False,
    ) -> None:
        """Run guided trajectories of the base, one per row of `conditions`, from `start`, with ω [B] in the standard convention.

        visit: called at every step.
        noised: `start` holds samples, which are noised at every timestep instead.
        """
        start, omega = start.to(self.device, self.dtype), omega.to(self.device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            with disabled(self):
                target, cond = self.predict_cfg(x, t, conditions, omega)
            return visit(State(x, t, conditions, target, lambda: cond))

        follow = visit_noised if noised else integrate
        with frozen(self.denoiser), torch.no_grad():
            follow(self.scheduler, start, steps, predict, generator=generator)

    def require_conditional(self, table: Conditions) -> None:
        """Raises: ValueError if the unconditional label is among the conditions to distil: guidance does not change it."""
        null = self.null(table)
        for condition in self.spec.adapted:
            value = table[condition.argument]
            if not value.is_floating_point() and (value == null[condition.argument]).any():
                raise ValueError(
                    f"{condition.argument} holds the null label {int(null[condition.argument][0])}, which guidance does not "
                    "move; expected labels of classes alone"
                )

    def require_adapter(self, who: str) -> Attachment:
        """The attached adapter. Raises: ValueError, in the name of `who`, if no adapter is attached or it is disabled."""
        attachment = attachment_of(self)
        if attachment is None or not attachment.enabled:
            found = "it disabled" if attachment else "none"
            raise ValueError(f"{who} expects an adapter that is attached and not disabled, found {found}")
        return attachment

    def refuse_armed(self) -> None:
        """Raises: RuntimeError if an adapter is armed, because the base's guidance would then come on top of it."""
        attachment = attachment_of(self.denoiser)
        if attachment is not None and attachment.active:
            raise RuntimeError(
                "the base's own prediction was asked for while an adapter is armed (double guidance); "
                "expected it outside of agd_fast.guided(...) or inside agd_fast.disabled(...)"
            )

    @contextmanager
    def base(self) -> Iterator[None]:
        """Inside this context, the base is frozen, in eval mode, without gradients and with any adapter off."""
        with frozen(self.denoiser), torch.no_grad(), disabled(self.denoiser):
            yield


def as_teacher(model: Any, scheduler: Any = None, **overrides: Any) -> Teacher:
    """Make a Teacher from a Teacher, a diffusers pipeline, or a denoiser with its scheduler.

    Raises: TypeError if there is no scheduler.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    if isinstance(model, Teacher):
        overrides = {**overrides, **({"scheduler": scheduler} if scheduler is not None else {})}
        return replace(model, denoiser=model._call, **overrides) if overrides else model
    scheduler = scheduler if scheduler is not None else getattr(model, "scheduler", None)
    if scheduler is None:
        raise TypeError(
            "expected a diffusers pipeline, an agd_fast.Teacher, or a denoiser with scheduler=..., "
            f"found a bare {type(model).__name__}"
        )
    if not isinstance(model, nn.Module):
        overrides.setdefault("name", str(getattr(model, "name_or_path", "") or type(model).__name__))
    return Teacher(component_of(model), scheduler, **overrides)


def _rule_name(rule: Any) -> str:
    if isinstance(rule, partial):
        settings = [*map(repr, rule.args), *(f"{name}={value!r}" for name, value in sorted(rule.keywords.items()))]
        return f"{_rule_name(rule.func)}({', '.join(settings)})"
    return f"{rule.__module__}.{rule.__qualname__}" if isinstance(rule, FunctionType) else repr(rule)


def _sample_shape(denoiser: nn.Module) -> tuple[int, ...]:
    config: Any = getattr(denoiser, "config", None)
    channels, size = getattr(config, "in_channels", None), getattr(config, "sample_size", None)
    if channels is None or size is None:
        raise ValueError(
            f"the sample shape of {type(denoiser).__name__} cannot be read off a config; "
            "expected Teacher(..., sample_shape=(C, H, W))"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return (channels, height, width)
