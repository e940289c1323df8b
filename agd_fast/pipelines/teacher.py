"""A pipeline of diffusers as the teacher: its own run decides what the guided prediction is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agd_fast.attaching import components_of, disabled, own_call, spec_of
from agd_fast.attaching.steps import number_of_steps
from agd_fast.files import fingerprint
from agd_fast.freezing import frozen
from agd_fast.guiders.teaching import guided_by, name_of_guider, require_teachable
from agd_fast.pipelines.record import Call, Recorder, Step
from agd_fast.spec import DenoiserSpec, nest
from agd_fast.teacher import Conditions, State, Teacher, Visit

Inputs = Mapping[str, Sequence[Any] | Tensor]


class _Probed(Exception):  # noqa: N818 (no error)
    """Carries the first call of a run out of it."""

    def __init__(self, call: Call) -> None:
        self.call = call


class _Probe(Recorder):
    """Ends a run where its denoiser is first called, before a forward that may be slow where the pipeline is now."""

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._called(args, kwargs)
        raise _Probed(self._halves(self.calls[0])[0])


@dataclass
class PipelineTeacher(Teacher):
    """One denoiser of a pipeline, guided as the pipeline guides it.

    pipe: the pipeline. component: name of the denoiser. inputs: what is conditioned on, one row a prompt, by argument of the
    pipeline's call: {"prompt": [...]}, or embeddings. call: its further arguments (height, width, negative_prompt, …).
    guider: a guider of diffusers whose rule takes the place of the pipeline's own.
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
        components = components_of(pipe, spec)
        component = component or next(iter(components))
        if guider is not None:
            require_teachable(guider)
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ValueError(f"expected inputs of one positive length, found {lengths or 'none'}")
        decided = {"num_inference_steps", "generator", *spec.pipeline.omega_arguments, *inputs} & set(call or {})
        if decided:
            raise ValueError(f"call holds {sorted(decided)}, which distilling decides; expected other arguments of the pipeline")
        return cls(
            denoiser=components[component],
            scheduler=pipe.scheduler,
            spec=spec,
            sample_shape=(0,),  # known once it is probed
            name=str(getattr(pipe, "name_or_path", "") or type(pipe).__name__),
            pipe=pipe,
            component=component,
            inputs=inputs,
            call=dict(call or {}),
            guider=guider,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._guider = copy.deepcopy(self.guider)  # one that runs writes what it finds in a denoiser into its own settings
        first = self._probe()
        self.sample_shape = tuple(first.sample.shape[1:])

    def to(self, device: torch.device) -> None:
        """All of the pipeline, unless its offloading decides where its models are."""
        if not getattr(self.pipe, "_all_hooks", None) and self.pipe.hf_device_map is None:
            self.pipe.to(device)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def run_size(self) -> int:  # type: ignore[override]
        return 1 if self.spec.listed else 4  # samples of several lengths make no batch

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
            text = (
                value if isinstance(value, Tensor) else torch.frombuffer(bytearray(repr(list(value)).encode()), dtype=torch.uint8)
            )
            found[name] = fingerprint({name: text})
        return found

    @property
    def guidance_name(self) -> str:
        own = f"{type(self.pipe).__module__}.{type(self.pipe).__name__}({', '.join(self._described_call())})"
        return own if self.guider is None else f"{name_of_guider(self.guider)} over {own}"

    def conditions(self, class_labels: Any = None, conditions: Conditions | None = None) -> dict[str, Tensor]:
        """Row numbers into the inputs, which are no tensors."""
        return {"input": torch.arange(len(self))}

    def require_conditional(self, table: Conditions) -> None:
        pass

    def predict(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One forward of the denoiser with recorded arguments; guided channels only, a list of outputs stacked."""
        moved = {
            name: conditions[name].movedim(0, dim) for name, dim in self.spec.batch_dims.items() if dim and name in conditions
        }
        arguments = {self.spec.sample: x, self.spec.timestep: timestep, **nest({**conditions, **moved}), **self._extra}
        listed = {name: list(arguments[name].unbind(0)) for name in self.spec.listed}
        output = self._call(**{**arguments, **listed})
        prediction = output if isinstance(output, Tensor) else output[0]
        if isinstance(prediction, list):
            prediction = torch.stack(prediction)
        return prediction[:, : self.guided_channels]

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

        # a guider's rule takes the place of the pipeline's, whose own scale only has to be above none
        scale = (3.0 if self.guider is not None else float(omega[0])) - self.spec.omega_offset
        generators = [torch.Generator().manual_seed(seed) for seed in start.tolist()]
        self._run_pipeline(conditions["input"].tolist(), scale, steps, generators, record)
        if first is None:
            raise self._never_stepped()

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

    def _probe(self) -> Call:
        """The first call of a short run, whatever it is conditioned on."""
        try:
            self._run_pipeline([0], 3.0, 2, [torch.Generator().manual_seed(0)], lambda step: step.guided, _Probe)
        except _Probed as found:
            return found.call
        raise self._never_stepped()

    def _never_stepped(self) -> ValueError:
        return ValueError(
            f"{type(self.pipe).__name__} never called its {self.component} and scheduler; expected a pipeline that steps "
            "`pipe.scheduler` with its prediction"
        )

    def _run_pipeline(
        self,
        rows: list[int],
        scale: float,
        steps: int,
        generators: list[torch.Generator],
        visit: Callable[[Step], Tensor],
        recorder: type[Recorder] = Recorder,
    ) -> None:
        """The pipeline's own call for these rows of the inputs, never armed."""
        call, spec = own_call(self.pipe, self.spec), self.spec.pipeline
        parameters = inspect.signature(call).parameters
        arguments = {**self.call, "num_inference_steps": steps, "generator": generators, **self._rows(rows)}
        if "output_type" in parameters:
            arguments.setdefault("output_type", "latent")
        record = recorder(self.pipe, self._call, self.spec, len(rows), visit)
        with ExitStack() as stack:
            stack.enter_context(frozen(self.denoiser))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_silent(self.pipe))
            arguments[spec.omega_arguments[0]] = scale
            vars(self.pipe).pop("_num_timesteps", None)  # of the last call
            record.run(lambda: call(**arguments))

    def generate(self, row: int, scale: float | None, steps: int, generator: torch.Generator) -> Any:
        """The pipeline's pictures of one row of the inputs, by its call as a user makes it; scale None is without guidance."""
        spec = self.spec.pipeline
        arguments = {**self.call, "num_inference_steps": steps, "generator": generator, **self._rows([row])}
        arguments[spec.omega_arguments[0]] = spec.cfg_off_value if scale is None else scale
        if "output_type" in inspect.signature(own_call(self.pipe, self.spec)).parameters:
            arguments["output_type"] = "pil"  # some pipelines of videos give arrays
        if scale is None:
            arguments = {name: value for name, value in arguments.items() if not name.startswith("negative_")}
        return self.pipe(**arguments)[0]

    def _rows(self, rows: list[int]) -> dict[str, Any]:
        """Their inputs, and the negative prompts, one a row as well."""
        found = {n: v[rows] if isinstance(v, Tensor) else [v[row] for row in rows] for n, v in self.inputs.items()}
        if not any(name.startswith("negative_prompt_embeds") for name in (*found, *self.call)):
            negative = {"negative_prompt": self.negative_prompt} | dict(self.call)
            names = [name for name in negative if name.startswith("negative_prompt") and name not in found]
            found |= {name: [negative[name]] * len(rows) for name in names if isinstance(negative[name], str)}
        return found

    @property
    def negative_prompt(self) -> str | None:
        """What ∅ is the encoding of, where the call or the pipeline's guidance says it."""
        return self.call.get("negative_prompt", self.spec.pipeline.negative_prompt)

    def _described_call(self) -> list[str]:
        return [f"{name}={_described(value)}" for name, value in sorted(self.call.items())]


def _described(value: Any) -> str:
    return fingerprint({"value": value}) if isinstance(value, Tensor) else repr(value)


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """No progress bar of the pipeline inside: there is one over all runs."""
    previous = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if previous is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = previous


def _require_same(first: Call, call: Call) -> None:
    """Raises: ValueError when a condition changes over the steps: one row a trajectory is stored."""
    for name, value in call.rows.items():
        if value is not first.rows.get(name) and not torch.equal(value, first.rows[name]):
            raise ValueError(
                f"the argument {name!r} changes from step to step, as a ControlNet's does; expected a pipeline whose denoiser is "
                "conditioned on the same at every step, for instance the plain one that this was made from"
            )
