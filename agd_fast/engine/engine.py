"""The engine: what a denoiser's call does once it is optimized.

It acts inside a scope (one call of a pipeline, one `guided` block) and without gradients. The first forward at new shapes runs as
before and is captured; from then on the captured program runs. Where it cannot, the plain path does, and a warning says why.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from agd_fast.attaching.attachment import attachment_of
from agd_fast.attaching.scope import Scope, scope_of
from agd_fast.engine.asked import Asked, Asking
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.copies import Copies, in_channels_last, prefers_channels_last
from agd_fast.engine.fingerprint import Fingerprint, obstacle
from agd_fast.engine.program import Program
from agd_fast.engine.recording import Recording
from agd_fast.engine.request import Request
from agd_fast.forward import argument_of, device_of, forward_parameters
from agd_fast.graph.capture import NotCapturableError, capture
from agd_fast.graph.rewriting import Rewritten
from agd_fast.spec import DenoiserSpec
from agd_fast.warning import described, warn

PROGRAMS = 16  # kept at once, one for each combination of shapes, armed or not, and values that a forward asks for
ANSWERS = 4  # sets of values asked for, at shapes already recorded, for which one scope may record forwards again
MET = 256  # sets of values asked for that are remembered
AGREEMENT = {torch.float16: 0.05, torch.bfloat16: 0.1}  # largest relative error of a captured program; other dtypes: EXACT
EXACT = 1e-2
_AUTOCAST = ("cuda", "cpu")


class Engine:
    """Stands in for the denoiser's own call; see `agd_fast.optimize`."""

    takes_scopes = True  # calls of a pipeline then open one

    def __init__(self, denoiser: nn.Module, spec: DenoiserSpec, config: EngineConfig) -> None:
        self.denoiser, self.spec, self.config = denoiser, spec, config
        self.parameters = forward_parameters(denoiser)
        self.recorded: dict[Any, list[Recording]] = {}  # by key; several where the values that a forward asks for differ
        self.refused: dict[Any, str] = {}  # why calls take the plain path, by key, or by key and values asked for
        self.obstacle = ""  # why all calls take the plain path, with the model as it is
        self.copies = Copies()
        self.unturned = ""  # why convolutions keep the layout of their weights
        self.unsettled: set[Any] = set()  # keys at which a forward that was to be recorded changed the model
        self.met: dict[Any, None] = {}  # values asked for that had no program when they came, the oldest first
        self.ahead_bytes = 0  # of the last scope
        self._model: Fingerprint | None = None
        self._told: set[str] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = scope_of(self.denoiser)
        if scope is None or scope.plain or self._is_plain:
            return self._plain(args, kwargs)
        with torch.inference_mode(False), torch.no_grad():  # what is made here serves calls in and outside of inference mode
            request = self._request(scope, args, kwargs)
            found, key = (None, None) if request is None else self._found(request, scope)
            if request is not None and found is not None:
                return self._run(found, request, scope)
        return self._plain(args, kwargs) if request is None or key is None else self._record(request, key, scope)

    def info(self) -> dict[str, Any]:
        """What the engine does, for a reader; `agd_fast.info` shows it.

        plain_because: why calls take the plain path, if any do.
        slower_because: why steps are not compiled, not a CUDA graph, or not in channels-last order.
        ahead_bytes: size of what was computed ahead in the last scope.
        copied_bytes: size of weights in other forms (see `EngineConfig`).

        These entries are of the last captured forward pass:
        repeated_blocks: number of distinct compiled pieces, and how often a step calls them; empty if it was compiled as a whole,
            or not compiled.
        joined: number of projections that became parts of others.
        gelu_epilogues: number of matrix products that end with their gelu.
        merged: number of low-rank terms that became parts of weights.
        kernels, not_on_kernels: number of pieces that run on a kernel of this library, by op, and of those that do not, by op and
            reason.
        """
        device = device_of(self.denoiser)
        programs = self._programs
        rewritten = programs[-1].rewritten if programs else Rewritten()
        troubles = [trouble for program in programs for trouble in (program.trouble, program.recorded.trouble)]
        return {
            "compile": self.config.compiles(device),
            "cuda_graph": self.config.graphs(device),
            "captured": len(self._recordings),
            "ahead_bytes": self.ahead_bytes,
            "copied_bytes": self.copies.bytes,
            "repeated_blocks": programs[-1].pieces if programs else {},
            "joined": rewritten.joined,
            "gelu_epilogues": rewritten.gelu_epilogues,
            "merged": rewritten.merged,
            **rewritten.kernels,
            "slower_because": list(dict.fromkeys(filter(None, [self.unturned, *troubles]))),
            "plain_because": list(dict.fromkeys([*filter(None, [self.obstacle]), *self.refused.values()])),
        }

    @property
    def _recordings(self) -> list[Recording]:
        return [found for kept in self.recorded.values() for found in kept]

    @property
    def _programs(self) -> list[Program]:
        return [program for found in self._recordings for program in found.programs]

    @property
    def _is_plain(self) -> bool:
        return torch.is_grad_enabled() or self.denoiser.training or any(map(torch.is_autocast_enabled, _AUTOCAST))

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.denoiser._call_impl(*args, **kwargs)

    def _request(self, scope: Scope, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
        """The request for a call; None where it is to take the plain path."""
        self._look(scope)
        if self.obstacle:
            return None
        attachment = attachment_of(self.denoiser)
        sample, time = (argument_of(name, self.parameters, args, kwargs) for name in (self.spec.sample, self.spec.timestep))
        guidance = scope.guidance if attachment is not None and attachment.enabled else None
        request = Request(self.denoiser._call_impl, args, kwargs, sample, time, attachment, guidance, self.config)
        if request.obstacle and request.key not in self.refused:
            self._refuse(request.key, request.obstacle)
        return None if request.key in self.refused else request

    def _found(self, request: Request, scope: Scope) -> tuple[Recording | None, Any]:
        """The recording for such a call; where there is none, the key under which to record it, or None if not now."""
        kept = self.recorded.get(request.key, [])
        found = next((one for one in kept if one.asked.holds(request.inputs, scope.store)), None)
        if found is not None or not kept:
            return found, request.key
        answers = (request.key, kept[0].asked.values(request.inputs, scope.store))
        return None, answers if self._is_due(answers, scope) else None

    def _run(self, found: Recording, request: Request, scope: Scope) -> Any:
        timesteps = scope.timesteps() if scope.timesteps and not request.has_several_times(scope.own_times) else None
        use = found.use(scope)
        prepared = found.prepared(use, request, timesteps, self.spec)
        number = None if request.guidance is None else request.guidance.number
        self.ahead_bytes = use.bytes
        results = use.program.run(request.inputs, prepared, number)
        if use.program.trouble:
            self._tell(use.program.trouble, "is optimized in part")
        return pytree.tree_unflatten(results, found.output)

    @property
    def _roots(self) -> list[nn.Module]:
        attachment = attachment_of(self.denoiser)
        return [self.denoiser, *([attachment.adapter] if attachment else [])]

    def _look(self, scope: Scope) -> None:
        """Forget everything if the model has changed. This is checked once a scope, or before every forward where the caller's
        own code runs between them."""
        if scope.looked and not scope.watched:
            return
        if self._model is None or not self._model.holds(self._roots):
            self._model = None  # until everything is forgotten
            self.recorded.clear()
            self.refused.clear()
            self.copies, self.unturned = Copies(), ""
            scope.store.clear()
            self.obstacle = obstacle(self.denoiser)
            self._model = Fingerprint(self._roots)
            if self.obstacle:
                self._tell(self.obstacle)
        elif not scope.looked:
            self.copies.renew()
            for found in self._recordings:
                found.program.renew()  # and with it what a finer program shares
        scope.looked = True

    def _is_due(self, answers: Any, scope: Scope) -> bool:
        """Whether to record a forward again for these values that it asks for: not the first time that they come, because every
        prompt may have its own."""
        here: dict[Any, bool] = scope.store.setdefault(Asked, {})  # met in this scope, and whether they were due
        if answers in here or answers in self.refused:
            return False
        here[answers] = answers in self.met and sum(here.values()) < ANSWERS
        self.met[answers] = None
        if len(self.met) > MET:
            del self.met[next(iter(self.met))]
        return here[answers]

    def _record(self, request: Request, key: Any, scope: Scope) -> Any:
        """Run one plain forward, and capture it. key: that of the calls to refuse if it cannot be captured."""
        before = Fingerprint(self._roots)
        output = self._plain(request.args, request.kwargs)
        settled = before.holds(self._roots)
        try:
            with torch.inference_mode(False), torch.no_grad():
                if settled:
                    self._keep(request, self._recording(request, output))
                    self.unsettled.discard(key)
                else:
                    self._wait_or_refuse(key, scope)
        except NotCapturableError as error:
            self._refuse(key, str(error))
        finally:
            if settled:
                gc.collect()  # recording leaves reference cycles that hold copies which nobody reads
        return output

    def _wait_or_refuse(self, key: Any, scope: Scope) -> None:
        """After a forward that changed the model: wait for the next, as the first may keep something for all others, such as
        tables of positions. Raises: NotCapturableError when it was not the first."""
        if key in self.unsettled:
            scope.plain = True  # further forwards will change the model, too
            raise NotCapturableError("its forward changes the model, as by counting its calls, which a recorded one would not")
        self.unsettled.add(key)
        scope.looked = False

    def _recording(self, request: Request, output: Any) -> Recording:
        """output: what the recorded forward must give. Raises: NotCapturableError."""
        leaves, tree = pytree.tree_flatten(output)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise NotCapturableError(f"its output holds more than tensors: {[type(leaf).__name__ for leaf in leaves]}")
        program, asked = self._turned_or_not(request, leaves)
        return Recording(program, tree, asked)

    def _turned_or_not(self, request: Request, expected: Sequence[Tensor]) -> tuple[Program, Asked]:
        """A program with convolutions in channels-last order where that is wanted and the model's code allows it; it may not, for
        example, where it asks for the layout of images. Raises: NotCapturableError."""
        if self.unturned or not self._has_channels_last:
            return self._program(request, expected)
        try:
            return self._program(request, expected, turned=True)
        except NotCapturableError as error:
            reason = f"its convolutions are not in channels-last order: {error}"
        found = self._program(request, expected)
        self.unturned = reason
        return found

    def _program(self, request: Request, expected: Sequence[Tensor], turned: bool = False) -> tuple[Program, Asked]:
        """A program that gives what is expected, contiguous where that is. turned: with convolutions in channels-last order.
        Raises: NotCapturableError."""
        asking = Asking(request.inputs, request.levels)

        def function(*tensors: Tensor) -> list[Tensor]:
            found = zip(asking(request.function)(*tensors), expected, strict=True)
            return [own.contiguous() if like.is_contiguous() and not own.is_contiguous() else own for own, like in found]

        with in_channels_last(self.denoiser, self.copies) if turned else nullcontext():
            captured = capture(function, request.inputs)
        try:
            program = Program(captured, request.levels, request.timestep, self.config, self.copies)
        except Exception as error:
            raise NotCapturableError(f"its graph cannot be cut ({described(error)})") from error
        _require_same(_first_results(program, request), expected)
        return program, Asked(asking.questions.values())

    @property
    def _has_channels_last(self) -> bool:
        if self.config.channels_last is not None:
            return self.config.channels_last
        return self.config.compiles(device_of(self.denoiser)) and prefers_channels_last(self.denoiser)

    def _keep(self, request: Request, found: Recording) -> None:
        """Keep a recording as the newest; if there are too many, the oldest goes."""
        kept = self.recorded.pop(request.key, [])
        self.recorded[request.key] = [*kept, found]
        if len(self._recordings) > PROGRAMS:
            oldest = next(iter(self.recorded))
            del self.recorded[oldest][0]
            if not self.recorded[oldest]:
                del self.recorded[oldest]

    def _refuse(self, key: Any, reason: str) -> None:
        self.refused[key] = reason
        self._tell(reason)

    def _tell(self, reason: str, what: str = "runs as it is, not optimized") -> None:
        if reason not in self._told:
            self._told.add(reason)
            warn(f"{type(self.denoiser).__name__} {what}: {reason}")


def _first_results(program: Program, request: Request) -> list[Tensor]:
    """Raises: NotCapturableError for a captured program that does not run."""
    prepared = program.prepare(request.inputs)
    try:
        while True:
            try:
                return program.step(request.inputs, prepared)
            except Exception as error:  # whatever a compiler may raise, on an old GPU or without a C++ compiler
                if not program.compiles:
                    raise
                program.do_without_compiling(error)
    except Exception as error:
        raise NotCapturableError(f"its captured form does not run ({described(error)})") from error


def _require_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises: NotCapturableError when a captured program does not give what the model gave."""
    for one, own in zip(found, expected, strict=True):
        if own.device.type == "meta" or not own.is_floating_point():
            continue
        error, size = (own.double() - one.double()).norm(), own.double().norm()
        if not error <= AGREEMENT.get(own.dtype, EXACT) * size:
            raise NotCapturableError(f"its captured form differs from it by {float(error / size):.2g} of the output")
