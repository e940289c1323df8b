"""Training passes as CUDA graphs: forward, loss and backward of a few states, which the host launches as one unit."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from agd_fast.attaching.foreign import mover
from agd_fast.distillation.config import TrainConfig
from agd_fast.distillation.pass_graph import GraphMemory, Pass, PassGraph
from agd_fast.memory.optimizer import WORK
from agd_fast.warning import first_line, warn

# Most graphs that are held, each for its own shapes. A choice: each further graph costs a recording, which takes the time of
# several passes, and what CUDA keeps for its nodes, which no counter of torch shows; the memory that graphs work in is that of
# the largest, however many there are. States of one shape need two, for whole and for left-over micro-batches.
MOST = 4
# How much a replay may differ from the pass: the loss and the norm of a gradient as a fraction of them, a gradient's direction as
# one minus the cosine. A random error of 14 % of a gradient changes its norm and its direction by 1 %. In bfloat16 a pass itself
# loses 1.1 to 3.9 % of a gradient (docs/memory.md). In float32 the bound does not detect rounding, but graphs that are wrong: one
# that reads another's memory, or misses what was added, is off by all of it.
BOUND = 1e-2
# The difference of a gradient below this fraction of the largest norm is measured relative to that fraction: the gradient may be
# zero but for rounding. A choice: differences of less than BOUND of it, 1e-5 of the largest norm, are not seen.
NEGLIGIBLE = 1e-3
ROOM = 3  # times the size of the gradients: what AdamW's first step takes, two moments and a square root


class _Trial(NamedTuple):
    """A pass as it ran, what it was given, its loss, and the gradients that it gave, by parameter, in host memory."""

    run: Pass
    tensors: Sequence[Tensor]
    loss: Tensor
    gradients: dict[Tensor, Tensor]


class _Trouble(NamedTuple):
    """Why a graph could not be made; of_memory: whether for lack of memory."""

    reason: str
    of_memory: bool = False


class Passes:
    """Runs passes: without a graph while their shapes are new, later each as one CUDA graph. It is a context: graphs are held
    inside and released at its end.

    The first batch in which no shape is new runs without graphs once more, and its passes are recorded as graphs at its end: then
    no pass needs memory besides theirs. All graphs are given up if one does not reproduce the loss and gradients of its pass, if
    a pass cannot be recorded, or if there is no memory for the first one, or none left for the optimizer. Once there has been a
    graph, a pass for whose graph there is no memory runs without.

    parameters: those whose gradients passes add to. trouble: why there are to be no graphs. host: whether the optimizer is
    `HostAdamW`.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device, trouble: str = "", host: bool = False) -> None:
        self.parameters, self.trouble, self.host = list(parameters), trouble, host
        self.model: nn.Module | None = None  # passes must not move its weights
        unnumbered = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if unnumbered else device
        self.replayed = False
        self._beyond = ""
        self._memory: GraphMemory | None = None
        self._graphs: dict[Any, tuple[PassGraph, list[Tensor]]] = {}  # with the parameters it gives gradients of
        self._gradients: dict[Tensor, Tensor] = {}  # that graphs add to, by parameter
        self._seen, self._new, self._refused = set[Any](), set[Any](), set[Any]()  # before this batch; in it; for want of memory
        self._trials: dict[Any, _Trial] = {}  # of this batch

    @classmethod
    def of(cls, config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module, adapter: nn.Module, host: bool) -> Passes:
        """The passes of a training run."""
        found = cls(adapter.parameters(), accelerator.device, why_plain(config, accelerator, denoiser), host)
        found.model = denoiser
        return found

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether graphs hold memory."""
        return bool(self._graphs)

    def release(self, refused: bool = False) -> None:
        """Give back what graphs hold. All shapes are new again, because weights may have moved before the next pass.

        refused: also those for whose graph there was no memory; otherwise these run without a graph for good.
        """
        self._give_back()
        if refused:
            self._refused.clear()
        self._seen.clear()
        self._new.clear()
        self._trials.clear()

    def _give_back(self) -> None:
        on_card = self._memory is not None and self.device.type == "cuda"
        if on_card:
            torch.cuda.synchronize(self.device)  # a replay may be under way
        self._graphs, self._gradients, self._memory = {}, {}, None
        if on_card:
            gc.collect()
            torch.cuda.empty_cache()

    def stop(self, trouble: str) -> None:
        """No graphs from here on. Warns."""
        self.trouble = trouble
        self.release()
        warn(f"training goes on without CUDA graphs: {trouble}")

    def info(self) -> dict[str, Any]:
        """Whether passes ran as graphs, and why not all did."""
        few = "" if self.replayed else "no batch came whose shapes were all known"
        return {"cuda_graph": self.replayed, "plain_because": self.trouble or self._beyond or few}

    def __call__(self, function: Pass, given: Any, key: Any = None) -> Tensor:
        """The loss of `function(given)`, with the tensors among `given` moved to the device.

        key: everything that the function depends on besides `given`.
        """
        leaves, spec = tree_flatten(given)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

        def run(found: Iterable[Tensor]) -> Tensor:
            rest = iter(found)
            return function(tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec))

        if self.trouble:
            return self._plain(run, tensors)
        of = [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        key = (key, str(spec), *of)
        if key in self._graphs:
            graph, parameters = self._graphs[key]
            self._attach(parameters)
            return graph(tensors)
        if key not in self._seen:
            self._new.add(key)
        elif key not in self._refused and key not in self._trials:
            if len(self._graphs) + len(self._trials) >= MOST:
                self._go_beyond(f"more than {MOST} shapes of passes: the further ones run as they are")
            elif not self._new:
                return self._tried(run, tensors, key)
        return self._plain(run, tensors)

    def _plain(self, run: Pass, tensors: Sequence[Tensor]) -> Tensor:
        return run([tensor.to(self.device, non_blocking=True) for tensor in tensors])

    def _attach(self, parameters: Sequence[Tensor]) -> None:
        """Put their gradients so far where graphs add to them."""
        fresh = []
        for parameter in parameters:
            place = self._gradients[parameter]
            if parameter.grad is None:
                fresh.append(place)
            elif parameter.grad is not place:
                place.copy_(parameter.grad)
            parameter.grad = place
        if fresh:
            torch._foreach_zero_(fresh)

    def _go_beyond(self, why: str) -> None:
        if not self._beyond:
            self._beyond = why
            warn(f"{why}, not as CUDA graphs")

    def _tried(self, run: Pass, tensors: Sequence[Tensor], key: Any) -> Tensor:
        """Run a pass of which a graph is to be made. Meanwhile the gradients of earlier passes are in host memory; a copy of its
        own gradients stays there until the batch ends."""
        before = self._taken_away()
        loss = self._plain(run, tensors)
        gradients = self._on_host()
        if gradients and all(one.norm().isfinite() for one in (loss, *gradients.values())):
            self._trials[key] = _Trial(run, tensors, loss, gradients)
        for one, gradient in before.items():
            gradient = gradient.to(self.device)
            one.grad = gradient if one.grad is None else one.grad.add_(gradient)
        return loss

    def _on_host(self) -> dict[Tensor, Tensor]:
        """Copies of the gradients so far, by parameter. Waits for the device."""
        return {one: one.grad.to("cpu", copy=True) for one in self.parameters if one.grad is not None}

    def _taken_away(self) -> dict[Tensor, Tensor]:
        """As `_on_host`, but the parameters have no gradients afterwards."""
        taken = self._on_host()
        self._clear()
        return taken

    def end_batch(self) -> None:
        """Called when all passes of a batch are done: makes graphs of them if none was new."""
        trials, new = self._trials, self._new
        self._trials, self._new = {}, set()
        self._seen |= new
        if new or not trials:
            return
        gradients = self._taken_away()
        for key, trial in trials.items():
            trouble = self._try(key, trial)
            if trouble is not None:  # handled where no traceback holds tensors
                self._without(key, trouble)
                break
        self._clear()
        for one, gradient in gradients.items():
            place = self._gradients.get(one)
            one.grad = gradient.to(self.device) if place is None else place.copy_(gradient)

    def _without(self, key: Any, trouble: _Trouble) -> None:
        """Handle a graph that could not be made. What its recording took stays in the memory shared with the others until that is
        given back; the next batch makes the others again."""
        if not (trouble.of_memory and self.replayed):
            self.stop(trouble.reason)
            return
        self._refused.add(key)
        self._give_back()
        self._go_beyond("memory ran out for a further graph: passes of its shapes run as they are")

    def _try(self, key: Any, trial: _Trial) -> _Trouble | None:
        """Record, replay and keep a graph, or say why not. The gradients are meaningless afterwards."""
        try:
            self._memory = self._memory or GraphMemory(self.device)
            for one in trial.gradients:
                if one not in self._gradients:
                    self._gradients[one] = torch.empty_like(one)
                one.grad = self._gradients[one]
            weights = [] if self.model is None else [*self.model.parameters(), *self.model.buffers()]
            places = [weight.data for weight in weights]
            graph = PassGraph(trial.run, trial.tensors, trial.loss, self._memory)
            if _moved(weights, places):
                return _Trouble("a pass gives the model's weights other memory")
            torch.empty(self._room, dtype=torch.uint8, device=self.device)
            torch._foreach_zero_([self._gradients[one] for one in trial.gradients])
            if reason := self._difference(trial, graph(trial.tensors)):
                return _Trouble(reason)
        except Exception as error:  # which the same pass did not raise without a graph
            before = error.__context__
            first = f", after {first_line(before)}" if isinstance(before, Exception) else ""
            reason = f"no graph of a pass could be made ({first_line(error) or type(error).__name__}{first})"
            return _Trouble(reason, any(isinstance(one, torch.OutOfMemoryError) for one in (error, before)))
        self._graphs[key] = graph, list(trial.gradients)
        self.replayed = True
        return None

    def _difference(self, trial: _Trial, loss: Tensor) -> str:
        """The difference of a replay's loss and gradients from the pass's, in words, if it is above BOUND; else empty."""
        least = NEGLIGIBLE * max(float(one.norm()) for one in trial.gradients.values())
        gradients = (_apart(one, self._gradients[parameter], least) for parameter, one in trial.gradients.items())
        worst = max((_apart(trial.loss, loss), *gradients), key=lambda one: (one != one, one))
        if worst <= BOUND:
            return ""
        return f"a graph's loss or gradients differ from those of the pass by {worst:.2g} of their size"

    @property
    def _room(self) -> int:
        """Bytes that a step of the optimizer takes besides the graphs."""
        return WORK if self.host else ROOM * sum(place.nbytes for place in self._gradients.values())

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def why_plain(config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module) -> str:
    """Why passes are to run without graphs; empty if they may be graphs."""
    device = accelerator.device
    if config.cuda_graph is False:
        return "TrainConfig(cuda_graph=False)"
    if device.type != "cuda":
        return f"no CUDA device, but {device.type}"
    if accelerator.num_processes > 1:
        return f"{accelerator.num_processes} processes"
    if accelerator.scaler is not None:
        return "gradients are scaled"
    if any(tensor.device.type != device.type for tensor in (*denoiser.parameters(), *denoiser.buffers())):
        return f"not all of the model is on {device}"
    for name, module in denoiser.named_modules():
        if hook := mover(module):
            return f"{hook} acts on {name or 'the model'}"
    return ""


def _moved(weights: Sequence[Tensor], places: Sequence[Tensor]) -> bool:
    """Whether weights were moved to other memory; they are put back."""
    moved = [pair for pair in zip(weights, places, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
    for weight, place in moved:
        weight.data = place
    return bool(moved)


def _apart(expected: Tensor, found: Tensor, least: float = 0.0) -> float:
    """The relative difference of the norms or, if it is larger, of the directions: ‖a − b‖² / 2‖a‖², which is 1 − cos for vectors
    of equal norm. If ‖a‖ is below `least`, the difference is relative to `least`."""
    found = found.to(expected.device)
    size, other, between = (float(one.norm()) for one in (expected, found, expected - found))
    unit = max(size, least) or 1.0
    return max(abs(size - other) / unit, (between / unit) ** 2 / 2)
