"""A pipeline of diffusers as the teacher: its own run decides what the guided prediction is."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor
from torch.utils._pytree import tree_map

from agd_fast.attaching import components_of, disabled, guiders_of, own_call, require_scale, spec_of
from agd_fast.attaching.steps import number_of_steps
from agd_fast.files import fingerprint
from agd_fast.freezing import frozen
from agd_fast.guiders.teaching import gives_cond_at_one, guided_by, name_of_guider, require_teachable
from agd_fast.pipelines.handed import PART, Handed, find_handed, numbered
from agd_fast.pipelines.inputs import Inputs, asking_for_images, described, make_batches, require_arguments, rows_of
from agd_fast.pipelines.record import Call, Recorder, Step, UnknownShape
from agd_fast.spec import DenoiserSpec, nest
from agd_fast.teacher import Conditions, State, Teacher, Visit

Arm = Literal["unguided", "cfg", "agd"]
ARMS: tuple[Arm, ...] = get_args(Arm)


class _Probed(Exception):  # noqa: N818 (no error)
    """Carries the first call of a run out of it."""

    def __init__(self, call: Call, arguments: dict[str, Any]) -> None:
        self.call, self.arguments = call, arguments


class _Probe(Recorder):
    """Ends a run where its denoiser is first called, before a forward that may be slow where the pipeline is now."""

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._called(args, kwargs)
        raise _Probed(self._halves(self.calls[0])[0], self.calls[0])


class _Asked(Exception):  # noqa: N818 (no error)
    """Carries what the scheduler was handed out of a run, and the shape of a sample of its denoiser's output."""

    def __init__(self, found: Tensor, shape: tuple[int, ...]) -> None:
        self.found, self.shape = found, shape


class _Numbered(Recorder):
    """Ends a run where the scheduler is first handed something of its denoiser's output, which is numbers."""

    def _returned(self, output: Any) -> Any:
        return numbered(super()._returned(output))

    def _stepped(self, step: Callable[..., Any], model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.shape and model_output.any():  # zeros: guiders may begin with a step of them
            self._require_combined(self.calls, model_output)
            raise _Asked(self._one_half(model_output), self.shape)
        return step(model_output, *args, **kwargs)


@dataclass
class PipelineTeacher(Teacher):
    """One denoiser of a pipeline, guided as the pipeline guides it.

    pipe: the pipeline. component: name of the denoiser. inputs: what is conditioned on, one row a prompt, by argument of the
    pipeline's call: {"prompt": [...]}, embeddings, images. call: its further arguments (height, width, negative_prompt, …).
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
        require_scale(pipe, spec)
        components = components_of(pipe, spec)
        component = component or next(iter(components))
        for one in guiders_of(pipe, spec) if guider is None else [guider]:
            require_teachable(one)
        lengths = {name: len(value) for name, value in inputs.items()}
        if len(set(lengths.values())) != 1 or not all(lengths.values()):
            raise ValueError(f"expected inputs of one positive length, found {lengths or 'none'}")
        decided = {"num_inference_steps", "generator", *spec.pipeline.omega_arguments, *inputs} & set(call or {})
        if decided:
            raise ValueError(f"call holds {sorted(decided)}, which distilling decides; expected other arguments of the pipeline")
        if any(one.is_meta for one in components[component].parameters()):
            raise ValueError(
                f"the weights of this pipeline's {component} lie in accelerate's hooks (sequential offloading), which hide them; "
                "expected weights that can be read, for instance with enable_model_cpu_offload()"
            )
        require_arguments(own_call(pipe, spec), {**inputs, **(call or {})}, type(pipe).__name__)
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
        self._handed: dict[tuple[int, ...], Handed] = {}
        first = self._probe()
        self.sample_shape = tuple(first.call.sample.shape[1:])
        self._arguments = tree_map(_without_values, first.arguments)

    def to(self, device: torch.device) -> None:
        """All of the pipeline, unless its offloading decides where its models are."""
        if not getattr(self.pipe, "_all_hooks", None) and self.pipe.hf_device_map is None:
            self.pipe.to(device)

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def run_size(self) -> int:  # type: ignore[override]
        return 4 if make_batches(self.inputs) and not self.spec.listed else 1  # samples of several lengths make no batch

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
        """Row numbers into the inputs, which are no tensors."""
        return {"input": torch.arange(len(self))}

    def require_conditional(self, table: Conditions) -> None:
        pass

    def predict(self, x: Tensor, timestep: Tensor, conditions: Conditions) -> Tensor:
        """One forward of the denoiser with recorded arguments; of the output, a list of them stacked, what is guided alone."""
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
        rows = conditions["input"].tolist()

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

        def follow() -> None:
            self._run_pipeline(rows, scale, steps, [torch.Generator().manual_seed(seed) for seed in start.tolist()], record)

        try:
            follow()
        except UnknownShape:  # the first one, or pictures of another size
            self.ask_what_is_handed(rows[0])
            follow()
        if first is None:
            raise self._never_stepped()

    def ask_what_is_handed(self, row: int) -> Mapping[tuple[int, ...], Handed]:
        """What the scheduler gets of the denoiser's output, by its shape: one forward, or two, for this row of the inputs.

        Raises: ValueError for a pipeline that hands on something else.
        """
        try:
            self._run_shortly(row, _Numbered)
        except _Asked as asked:
            handed = find_handed(asked.found, asked.shape)
        else:
            raise self._never_stepped()
        if handed is None:
            raise ValueError(
                f"{type(self.pipe).__name__} hands its scheduler something else than its {self.component}'s guided output; "
                "expected all of it or a part, in any order and with either sign"
            )
        self._handed[handed.shape] = handed
        return self._handed

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

    def _probe(self) -> _Probed:
        """The first call of a short run, whatever it is conditioned on."""
        try:
            with asking_for_images(own_call(self.pipe, self.spec), {**self.inputs, **self.call}, type(self.pipe).__name__):
                self._run_shortly(0, _Probe)
        except _Probed as found:
            return found
        raise self._never_stepped()

    def _run_shortly(self, row: int, recorder: type[Recorder]) -> None:
        """Two steps, of more where image to image leaves out the first ones."""
        strength = inspect.signature(own_call(self.pipe, self.spec)).parameters.get("strength")
        share = float(self.call.get("strength", 1.0 if strength is None else strength.default))
        steps = math.ceil(2 / max(share, 0.01))
        self._run_pipeline([row], 3.0, steps, [torch.Generator().manual_seed(0)], lambda step: step.guided, recorder)

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
        record = recorder(self.pipe, self._call, self.spec, len(rows), visit, self._handed)
        with ExitStack() as stack:
            stack.enter_context(frozen(self.denoiser))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_silent(self.pipe))
            stack.enter_context(self._seeded(generators))
            arguments[spec.omega_arguments[0]] = scale
            vars(self.pipe).pop("_num_timesteps", None)  # of the last call
            try:
                record.run(lambda: call(**arguments))
            except BaseException:
                self.pipe.maybe_free_model_hooks()  # as at the end of a call: a model that is offloaded is no longer on the card
                raise

    def generate(self, rows: Sequence[int], arm: Arm, scale: float, steps: int, seeds: Sequence[int]) -> list[Image.Image]:
        """The pipeline's pictures of rows of the inputs, by its call as a user makes it: middle frames of videos, none of sound.

        arm: "agd" is the attached adapter, "cfg" the pipeline's own guidance. scale: in the family's own convention.
        seeds: of the noise, one a row, so that it is the same whatever the rows are that are made together. What a pipeline
        draws from torch's own generator, as JoyImage Edit the latents of its picture, follows the first one.
        """
        spec = self.spec.pipeline
        if not spec.pictures:
            return []
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        arguments = {**self.call, "num_inference_steps": steps, "generator": generators, **self._rows([*rows])}
        arguments[spec.omega_arguments[0]] = spec.cfg_off_value if arm == "unguided" else scale
        if "output_type" in inspect.signature(own_call(self.pipe, self.spec)).parameters:
            arguments["output_type"] = "pil"  # some pipelines of videos give arrays
        # of a text an adapter tells whether it has learnt it
        left_out = [n for n, v in arguments.items() if arm == "unguided" or (arm == "agd" and _is_embedded(v))]
        arguments = {n: v for n, v in arguments.items() if not (n.startswith("negative_") and n in left_out)}
        base = nullcontext() if arm == "agd" else disabled(self.pipe)
        with base, torch.no_grad(), _silent(self.pipe), self._seeded(generators):
            output = self.pipe(**arguments)[0]
        found = [one[len(one) // 2] if isinstance(one, list) else one for one in output]
        return found if all(isinstance(one, Image.Image) for one in found) else []

    @contextmanager
    def _seeded(self, generators: list[torch.Generator]) -> Iterator[None]:
        """Inside, torch's own generators begin as the first of these: some pipelines encode pictures with them."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(generators[0].initial_seed())
            yield

    def _rows(self, rows: list[int]) -> dict[str, Any]:
        """Their inputs, and the negative prompts, one a row as well."""
        found = rows_of(self.inputs, rows)
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
        return [f"{name}={described(value)}" for name, value in sorted(self.call.items())]


def _is_embedded(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(one, Tensor) for one in value))


def _without_values(leaf: Any) -> Any:
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


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
