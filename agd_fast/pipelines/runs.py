"""A pipeline's own calls for rows of its inputs: runs that are followed, short ones that find something out, pictures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor, nn

from agd_fast.attaching import disabled, own_call, uncompiled, without_negatives
from agd_fast.forward import device_of
from agd_fast.freezing import frozen
from agd_fast.pipelines.handed import Handed, find_handed, numbered
from agd_fast.pipelines.inputs import Inputs, asking_for_images, rows_of
from agd_fast.pipelines.record import Call, Recorder, Step, UnknownShape
from agd_fast.spec import DenoiserSpec

Arm = Literal["unguided", "cfg", "agd"]
ARMS: tuple[Arm, ...] = get_args(Arm)


class _Answer(Exception):  # noqa: N818 (no error)
    """Ends a run and carries its answer out."""


class _FirstCall(Recorder):
    """Ends a run at its denoiser's first call, before the forward, which may be slow on the pipeline's current device."""

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._called(args, kwargs)
        raise _Answer(self._halves(self.calls[0])[0], self.calls[0])


class _Numbered(Recorder):
    """Numbers the elements of its denoiser's output, and ends a run when the scheduler is first handed some of them. The answer
    is these, and the shape of one sample of the output."""

    def _returned(self, output: Any) -> Any:
        return numbered(super()._returned(output))

    def _stepped(self, step: Callable[..., Any], model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.shape and model_output.any():  # not zeros, as a guider's first step may give
            self._require_combined(model_output)
            raise _Answer(self._one_half(model_output), self.shape)
        return step(model_output, *args, **kwargs)

    def _require_combined(self, model_output: Tensor) -> None:
        """Raises: ValueError if the scheduler is handed two predictions from separate forwards, as in Cosmos 1."""
        if self._is_doubled(model_output) and all(len(call[self.spec.sample]) == self.batch for call in self.calls):
            raise ValueError(
                f"{type(self.pipe).__name__} hands its scheduler the conditional and the unconditional prediction before it "
                "combines them; expected the guided one"
            )

    def _is_doubled(self, model_output: Tensor) -> bool:
        """Decided by its numbers, which are the same for every sample."""
        return len(model_output) == 2 * self.batch and torch.equal(*model_output.chunk(2))


@dataclass
class Runs:
    """The calls of a pipeline for one of its denoisers.

    component: the denoiser's name. denoiser: the module, as compiled if it is compiled. inputs, call: as in `PipelineTeacher`.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    spec: DenoiserSpec
    inputs: Inputs
    call: Mapping[str, Any]
    handed: dict[tuple[int, ...], Handed] = field(default_factory=dict)

    def first_call(self) -> tuple[Call, dict[str, Any]]:
        """The first call of the denoiser in a run, conditional or not, and all arguments of it."""
        with asking_for_images(own_call(self.pipe, self.spec), {**self.inputs, **self.call}, type(self.pipe).__name__):
            call, arguments = self._ask(0, _FirstCall)
        return call, arguments

    def ask_what_is_handed(self, row: int) -> Mapping[tuple[int, ...], Handed]:
        """What the scheduler gets of the denoiser's output, by its shape; takes one or two forwards for this row of the inputs.

        Raises: ValueError for a pipeline that hands on something else.
        """
        handed = find_handed(*self._ask(row, _Numbered))
        if handed is None:
            raise ValueError(
                f"{type(self.pipe).__name__} hands its scheduler something else than its {self.component}'s guided output; "
                "expected all of it or a part, in any order and with either sign"
            )
        self.handed[handed.shape] = handed
        return self.handed

    def follow(
        self, rows: Sequence[int], scale: float, steps: int, seeds: Sequence[int], visit: Callable[[Step], Tensor]
    ) -> None:
        """One guided run, never armed. visit: is handed every step, and returns the guided prediction [B, ...] to go on with.

        Raises: ValueError for a pipeline that does not step its scheduler with what its denoiser predicts.
        """
        try:
            recorder = self._run(rows, scale, steps, seeds, visit)
        except UnknownShape:  # the first one, or pictures of another size
            self.ask_what_is_handed(rows[0])
            recorder = self._run(rows, scale, steps, seeds, visit)
        if not recorder.visited:
            raise self._never_stepped()

    def generate(self, rows: Sequence[int], arm: Arm, scale: float, steps: int, seeds: Sequence[int]) -> list[Image.Image]:
        """The pipeline's pictures for rows of its inputs, by a call as users make it: middle frames of videos, none of sound.

        arm: "agd" is the attached adapter, "cfg" the pipeline's own guidance. scale: in the family's own convention.
        seeds: of the noise, one per row, so that the noise does not depend on which rows are made together. What a pipeline draws
        from torch's own generator, as JoyImage Edit does with the latents of its picture, follows the first seed.
        """
        spec = self.spec.pipeline
        if not spec.pictures:
            return []
        arguments = self._arguments(rows, spec.cfg_off_value if arm == "unguided" else scale, steps, seeds)
        if self._takes("output_type"):
            arguments["output_type"] = "pil"  # some video pipelines otherwise give arrays
        # negative text stays in an adapter's call, which tells whether the adapter has learnt it
        kept = without_negatives(arguments, inspect.signature(own_call(self.pipe, self.spec)).parameters)
        left_out = [n for n, v in arguments.items() if arm == "unguided" or (arm == "agd" and _is_embedded(v))]
        arguments = {n: v for n, v in arguments.items() if n in kept or n not in left_out}
        with nullcontext() if arm == "agd" else disabled(self.pipe), self._held(seeds[0]):
            output = self.pipe(**arguments)[0]
        found = [one[len(one) // 2] if isinstance(one, list) else one for one in output]
        return found if all(isinstance(one, Image.Image) for one in found) else []

    def _ask(self, row: int, recorder: type[Recorder]) -> tuple[Any, ...]:
        """The answer of a run of two steps, or of more if image-to-image leaves out the first ones."""
        strength = inspect.signature(own_call(self.pipe, self.spec)).parameters.get("strength")
        share = float(self.call.get("strength", 1.0 if strength is None else strength.default))
        try:
            self._run([row], 3.0, math.ceil(2 / max(share, 0.01)), [0], lambda step: step.guided, recorder)
        except _Answer as answer:
            return answer.args
        raise self._never_stepped()

    def _run(
        self,
        rows: Sequence[int],
        scale: float,
        steps: int,
        seeds: Sequence[int],
        visit: Callable[[Step], Tensor],
        recorder: type[Recorder] = Recorder,
    ) -> Recorder:
        arguments = self._arguments(rows, scale, steps, seeds)
        if self._takes("output_type"):
            arguments.setdefault("output_type", "latent")
        record = recorder(self.pipe, self.denoiser, self.spec, len(rows), visit, self.handed)
        with frozen(uncompiled(self.denoiser)), self._held(seeds[0]):
            vars(self.pipe).pop("_num_timesteps", None)  # of the last call
            try:
                record.run(lambda: own_call(self.pipe, self.spec)(**arguments))
            except BaseException:
                self.pipe.maybe_free_model_hooks()  # as at the end of a call: offloaded models leave the GPU
                raise
        return record

    def _arguments(self, rows: Sequence[int], scale: float, steps: int, seeds: Sequence[int]) -> dict[str, Any]:
        """Arguments of a call: the inputs of these rows, and the negative prompts, also one per row."""
        batched = self.spec.pipeline.batched
        if len(rows) > 1 and not batched:
            raise ValueError(f"{type(self.pipe).__name__} takes one prompt a call; expected batches of 1, found {len(rows)}")
        found = rows_of(self.inputs, rows, batched)
        if not any(name.startswith("negative_prompt_embeds") for name in (*found, *self.call)):
            negative = {"negative_prompt": self.spec.pipeline.negative_prompt} | dict(self.call)
            names = [name for name in negative if name.startswith("negative_prompt") and name not in found]
            texts = {name: negative[name] for name in names if isinstance(negative[name], str)}
            found |= {name: [text] * len(rows) if batched else text for name, text in texts.items()}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        found["generator"] = generators if batched else generators[0]
        return {**self.call, **found, "num_inference_steps": steps, self.spec.pipeline.omega_arguments[0]: scale}

    def _takes(self, parameter: str) -> bool:
        return parameter in inspect.signature(own_call(self.pipe, self.spec)).parameters

    @contextmanager
    def _held(self, seed: int) -> Iterator[None]:
        """Inside, no gradients, no progress bar, and torch's own generators start from this seed: some pipelines encode pictures
        with them."""
        device = device_of(self.denoiser)
        with torch.no_grad(), _silent(self.pipe), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def _never_stepped(self) -> ValueError:
        return ValueError(
            f"{type(self.pipe).__name__} never called its {self.component} and scheduler; expected a pipeline that steps "
            "`pipe.scheduler` with its prediction"
        )


def _is_embedded(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, list) and all(isinstance(one, Tensor) for one in value))


@contextmanager
def _silent(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline shows no progress bar: there is one over all runs."""
    previous = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if previous is None:
            vars(pipe).pop("_progress_bar_config", None)  # a pipeline may only pass the setting on
        else:
            pipe._progress_bar_config = previous
