"""A pipeline of diffusers as the teacher: its own run decides what the guided prediction is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from agd_fast.attaching import components_of, disabled, guiders_of, own_call, require_known_call, spec_of
from agd_fast.attaching.scales import REPEATS
from agd_fast.attaching.steps import number_of_steps
from agd_fast.files import fingerprint
from agd_fast.forward import nest
from agd_fast.guiders.teaching import gives_cond_at_one, guided_by, name_of_guider, require_teachable
from agd_fast.pipelines.handed import PART
from agd_fast.pipelines.inputs import Inputs, described, make_batches, require_arguments
from agd_fast.pipelines.record import Call, Step
from agd_fast.pipelines.runs import Runs
from agd_fast.spec import DenoiserSpec
from agd_fast.teacher import Conditions, State, Teacher, Visit


@dataclass
class PipelineTeacher(Teacher):
    """One denoiser of a pipeline, guided as the pipeline guides it.

    pipe: the pipeline. component: name of the denoiser. inputs: what is conditioned on, one row per prompt, by argument of the
    pipeline's call: {"prompt": [...]}, embeddings, images. call: its further arguments (height, width, negative_prompt, …).
    guider: a guider of diffusers whose rule replaces the pipeline's own.
    """

    pipe: Any = None
    component: str = "transformer"
    inputs: Inputs = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    guider: Any = None

    one_scale_a_run = True  # a pipeline's call takes one guidance scale
    validation_runs = 8
    guidance_range = (1.0, 12.0)  # the paper's for text

    @classmethod
    def of(
        cls,
        pipe: Any,
        component: str | None = None,
        *,
        inputs: Inputs,
        call: Mapping[str, Any] | None = None,
        guider: Any = None,
        spec: DenoiserSpec | None = None,
    ) -> PipelineTeacher:
        """Raises: TypeError, ValueError for a pipeline, inputs or a guider that cannot be distilled."""
        spec = spec_of(pipe, spec)
        require_known_call(pipe, spec)
        components = components_of(pipe, spec)
        component = component or next(iter(components))
        for one in guiders_of(pipe, spec) if guider is None else [guider]:
            require_teachable(one)
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ValueError(f"expected inputs of one positive length, found {lengths or 'none'}")
        call = {name: value for name, value in (call or {}).items() if name not in REPEATS or value != 1}  # 1 is what runs anyway
        decided = {"num_inference_steps", "generator", *REPEATS, *spec.pipeline.omega_arguments, *inputs} & set(call)
        if decided:
            raise ValueError(f"call holds {sorted(decided)}, which distilling decides; expected other arguments of the pipeline")
        if any(one.is_meta for one in components[component].parameters()):
            raise ValueError(
                f"the weights of this pipeline's {component} lie in accelerate's hooks (sequential offloading), which hide them; "
                "expected weights that can be read, for instance with enable_model_cpu_offload()"
            )
        require_arguments(own_call(pipe, spec), {**inputs, **call}, type(pipe))
        return cls(
            denoiser=components[component],
            scheduler=pipe.scheduler,
            spec=spec,
            sample_shape=(0,),  # set by __post_init__
            name=str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
            pipe=pipe,
            component=component,
            inputs=inputs,
            call=call,
            guider=guider,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._guider = copy.deepcopy(self.guider)  # a running guider writes what it finds in a denoiser into its settings
        self.runs = Runs(self.pipe, self.component, self._call, self.spec, self.inputs, self.call)
        first, arguments = self.runs.first_call()
        self.sample_shape = tuple(first.sample.shape[1:])
        self._arguments = tree_map(_without_values, arguments)

    def to(self, device: torch.device) -> None:
        """Move all of the pipeline, unless its offloading decides where its models are."""
        if not getattr(self.pipe, "_all_hooks", None) and self.pipe.hf_device_map is None:
            self.pipe.to(device)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def run_size(self) -> int:  # type: ignore[override]
        batched = self.spec.pipeline.batched and not self.spec.listed  # samples of different lengths make no batch
        return 4 if make_batches(self.inputs) and batched else 1

    @property
    def owner(self) -> Any:
        return self.pipe

    @property
    def about(self) -> dict[str, Any]:
        from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING as KNOWN  # which imports every pipeline

        described = ", ".join(self._described_call())
        tag = "text-to-image" if type(self.pipe).__name__ in {cls.__name__ for cls in KNOWN.values()} else None
        return {"pipeline": type(self.pipe).__name__, "component": self.component, "call": described, "pipeline_tag": tag}

    def fingerprints(self, table: Conditions) -> dict[str, str]:
        found = {}
        for name, value in self.inputs.items():
            text = value if isinstance(value, Tensor) else _as_bytes(described(list(value)))
            found[name] = fingerprint({name: text})
        return found

    @property
    def guidance_name(self) -> str:
        own = f"{type(self.pipe).__module__}.{type(self.pipe).__name__}({', '.join(self._described_call())})"
        if self.guider is not None:
            return f"{name_of_guider(self.guider)} over {own}"
        return " with ".join([own, *map(name_of_guider, guiders_of(self.pipe, self.spec))])

    @property
    def guides_above(self) -> float:  # type: ignore[override]
        return self.spec.guides_above if self.guider is None else super().guides_above

    @property
    def gives_cond_at_one(self) -> bool:  # type: ignore[override]
        guiders = guiders_of(self.pipe, self.spec) if self.guider is None else [self.guider]
        return all(map(gives_cond_at_one, guiders))

    def conditions(self, class_labels: Any = None, conditions: Conditions | None = None) -> dict[str, Tensor]:
        """Row numbers into the inputs, which need not be tensors."""
        return {"input": torch.arange(len(self))}

    def require_conditional(self, table: Conditions) -> None:
        pass

    def predict(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One forward of the denoiser with recorded arguments. Gives only the guided part of the output; a list is stacked."""
        conditions = {**conditions}
        part = conditions.pop(PART, None)
        moved = {name: value.movedim(0, dim) for name, value in conditions.items() if (dim := self.spec.batch_dim(name))}
        moved |= {name: conditions[name].flatten(0, 1) for name in self.spec.grouped}
        arguments = {self.spec.sample: x, self.spec.timestep: timestep, **nest({**conditions, **moved}), **self._extra}
        listed = {name: list(arguments[name].unbind(0)) for name in self.spec.listed}
        repeated = {name: conditions[name] * len(x) for name in self.spec.repeated}
        output = self._call(**{**arguments, **listed, **repeated})
        prediction = output if isinstance(output, Tensor) else output[0]
        if isinstance(prediction, list):
            prediction = torch.stack(prediction)
        if part is None:
            return prediction[:, : self.guided_channels]
        return prediction[tuple(slice(*ends) for ends in ((None,), *part))]

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """A seed for each trajectory's noise."""
        return torch.randint(2**31, (count,), generator=generator)

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
        if noised:
            raise ValueError(
                "a pipeline's own runs are followed; expected agd_fast.Teacher(...) to train on noised data, found a pipeline"
            )
        first: Call | None = None

        def record(step: Step) -> Tensor:
            nonlocal first
            call = step.conditional
            first = first or call
            _require_same(first, call)
            target = step.guided
            if self.guider is not None and step.unconditional is not None:
                target = self._ask_guider(step, float(omega[0]))
            return visit(State(call.sample, call.timestep, call.rows, target, lambda: self._unguided(call), call.constants))

        # with a guider, the pipeline's own scale only has to turn its guidance on
        scale = (3.0 if self.guider is not None else float(omega[0])) - self.spec.omega_offset
        self.runs.follow(conditions["input"].tolist(), scale, steps, start.tolist(), record)

    def _ask_guider(self, step: Step, omega: float) -> Tensor:
        assert step.unconditional is not None
        calls = {"cond": step.conditional, "uncond": step.unconditional}
        total = number_of_steps(self.pipe)
        with disabled(self.pipe):
            return guided_by(
                self._guider,
                self.denoiser,
                self._predict_call,
                calls,
                omega,
                step=step.index,
                steps=total,
                timestep=step.conditional.timestep,
            )

    def _predict_call(self, call: Call) -> Tensor:
        return self.predict(call.sample, call.timestep, {**call.rows, **call.constants})

    def _unguided(self, call: Call) -> Tensor:
        with disabled(self.pipe):
            return self._predict_call(call)

    def arguments_on_meta(self, conditions: Conditions, count: int) -> dict[str, Any]:
        return self._arguments

    def _described_call(self) -> list[str]:
        return [f"{name}={described(value)}" for name, value in sorted(self.call.items())]


def _without_values(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _require_same(first: Call, call: Call) -> None:
    """Raises: ValueError when a condition changes over the steps: only one row per trajectory is stored."""
    before, now = ({**one.rows, **one.constants} for one in (first, call))
    for name in {**before, **now}:
        if not _equal(before.get(name), now.get(name)):
            raise ValueError(
                f"the argument {name!r} changes from step to step, as a ControlNet's does; expected a pipeline whose denoiser is "
                "conditioned on the same at every step, for instance the plain one that this was made from"
            )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
