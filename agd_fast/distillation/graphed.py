"""Passes of training as CUDA graphs: forward, loss and backward of a few states, which the host starts as one thing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from agd_fast.distillation.config import TrainConfig
from agd_fast.memory.optimizer import WORK
from agd_fast.warning import first_line, warn

MOST = 4  # graphs that are held: each is of its own shapes
# What the loss and the norm of a gradient may differ by in a replay, as a share of them, or of this share of the largest norm.
# The same kernels differ by the order of atomic additions alone: a rounding of 2⁻⁹ of an element in bfloat16, less in a norm.
# What reads memory that is another's, or misses what was added, differs by all of it.
BOUND, NEGLIGIBLE = 1e-2, 1e-3
ROOM = 3  # times the gradients: what AdamW's first step takes, two moments and a square root

Pass = Callable[[Any], Tensor]  # adds to the gradients of parameters and gives the loss, a scalar without history


class GraphMemory:
    """What the graphs of one training work in: they run one after another, and nothing in it outlives a replay."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def abandon(self) -> None:
        """After a recording that failed: where it was invalidated, torch ends it without telling its allocator, which would
        refuse to give memory back from then on."""
        with suppress(RuntimeError):  # it was told
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
            torch._C._cuda_releasePool(self.device.index, self.pool)
        with suppress(RuntimeError):  # what CUDA has to say of it, before it says that to somebody else
            torch.cuda.synchronize(self.device)


class PassGraph:
    """A pass recorded once, on tensors of its own and on the gradients that the parameters have then: a replay adds to those."""

    def __init__(self, function: Pass, tensors: Sequence[Tensor], loss: Tensor, memory: GraphMemory) -> None:
        self.tensors = [torch.zeros_like(tensor, device=loss.device) for tensor in tensors]
        self.loss = torch.zeros_like(loss)
        self._record(lambda: self.loss.copy_(function(self.tensors)), memory)

    def _record(self, run: Callable[[], Any], memory: GraphMemory) -> None:
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # what is left of other passes would keep nodes of autograd that belong to another stream
        with torch.cuda.device(memory.device), torch.cuda.stream(torch.cuda.current_stream()):  # no failure leaves another one
            try:
                with torch.cuda.graph(self.graph, memory.pool, memory.stream, capture_error_mode="thread_local"):
                    run()
            except BaseException:
                memory.abandon()
                raise
            torch._C._cuda_clearCublasWorkspaces()  # which lie in the pool

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        for place, tensor in zip(self.tensors, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()


class Passes:
    """Runs passes: at shapes that are new as they are, from the second time on as one CUDA graph. Inside of the context that it
    is they are held, at its end released.

    The second time a pass runs as it is once more, then as a graph: what does not give the same loss and gradients is not used,
    nor is a graph that cannot be recorded, or that leaves no memory for the optimizer.

    parameters: whose gradients passes add to. trouble: why there are to be no graphs. host: whether the optimizer is `HostAdamW`.
    """

    def __init__(self, parameters: Iterable[Tensor], device: torch.device, trouble: str = "", host: bool = False) -> None:
        self.parameters, self.trouble, self.host = list(parameters), trouble, host
        self.weights: list[Tensor] = []  # of the model that is trained
        unnumbered = device.type == "cuda" and device.index is None
        self.device = torch.device("cuda", torch.cuda.current_device()) if unnumbered else device
        self.replayed = False
        self._beyond = ""
        self._memory: GraphMemory | None = None
        self._graphs: dict[Any, tuple[PassGraph, list[Tensor]]] = {}  # with the parameters that it has gradients of
        self._gradients: dict[Tensor, Tensor] = {}  # that graphs add to, by parameter
        self._seen: set[Any] = set()

    @classmethod
    def of(cls, config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module, adapter: nn.Module, host: bool) -> Passes:
        """Those of a training."""
        found = cls(adapter.parameters(), accelerator.device, why_plain(config, accelerator, denoiser), host)
        found.weights = [*denoiser.parameters(), *denoiser.buffers()]
        return found

    def __enter__(self) -> Passes:
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether there is memory of graphs."""
        return bool(self._graphs)

    def release(self) -> None:
        """Give back what graphs hold. All shapes are new again: weights may lie elsewhere by then."""
        on_card = self._memory is not None and self.device.type == "cuda"
        if on_card:
            torch.cuda.synchronize(self.device)  # a replay may be under way
        self._graphs, self._gradients, self._memory = {}, {}, None
        self._seen.clear()
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
        few = "" if self.replayed else "no shapes came twice"
        return {"cuda_graph": self.replayed, "plain_because": self.trouble or self._beyond or few}

    def __call__(self, function: Pass, given: Any, key: Any = None) -> Tensor:
        """The loss of `function(given)`, with the tensors among `given` on the device.

        key: all that the function depends on but `given`.
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
            self._seen.add(key)
        elif len(self._graphs) < MOST:
            return self._recorded(run, tensors, key)
        elif not self._beyond:
            self._beyond = f"more than {MOST} shapes of passes: the further ones run as they are"
            warn(f"{self._beyond}, not as CUDA graphs")
        return self._plain(run, tensors)

    def _plain(self, run: Pass, tensors: Sequence[Tensor]) -> Tensor:
        return run([tensor.to(self.device, non_blocking=True) for tensor in tensors])

    def _attach(self, parameters: Sequence[Tensor]) -> None:
        """Their gradients so far to where graphs add to them."""
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

    def _recorded(self, run: Pass, tensors: Sequence[Tensor], key: Any) -> Tensor:
        """A pass of which a graph is made. Gradients of passes before it are in host memory meanwhile."""
        before = [(one, one.grad.to("cpu", copy=True)) for one in self.parameters if one.grad is not None]
        self._clear()
        loss = self._plain(run, tensors)
        used = [one for one in self.parameters if one.grad is not None]
        expected = _sizes(loss, used)
        if used and all(map(_finite, expected)):
            trouble = self._try(run, tensors, key, loss, used, expected)
            if trouble:  # out of the reach of any traceback that holds tensors
                self.stop(trouble)
                self._clear()
                loss = self._plain(run, tensors)
        for one, gradient in before:
            gradient = gradient.to(self.device)
            one.grad = gradient if one.grad is None else one.grad.add_(gradient)
        return loss

    def _try(
        self, run: Pass, tensors: Sequence[Tensor], key: Any, loss: Tensor, used: list[Tensor], expected: list[float]
    ) -> str:
        """Record and replay. Empty where the graph is kept: `loss` and the gradients are what it gave then; else why not, and the
        gradients are of no use."""
        try:
            self._memory = self._memory or GraphMemory(self.device)
            for one in used:
                if one not in self._gradients:
                    self._gradients[one] = torch.empty_like(one)
                one.grad = self._gradients[one].copy_(one.grad)  # type: ignore[arg-type]
            places = [weight.data for weight in self.weights]
            graph = PassGraph(run, tensors, loss, self._memory)
            if self._moved(places):
                return "a pass gives the model's weights other memory"
            torch.empty(self._room, dtype=torch.uint8, device=self.device)
            torch._foreach_zero_([self._gradients[one] for one in used])
            loss.copy_(graph(tensors))
            if trouble := _difference(expected, _sizes(loss, used)):
                return trouble
        except Exception as error:  # which the same pass did not raise as it is
            first = f", after {first_line(error.__context__)}" if isinstance(error.__context__, Exception) else ""
            return f"no graph of a pass could be made ({first_line(error) or type(error).__name__}{first})"
        self._graphs[key] = graph, used
        self.replayed = True
        return ""

    def _moved(self, places: list[Tensor]) -> bool:
        """Whether weights lie elsewhere than before; they are brought back."""
        moved = [pair for pair in zip(self.weights, places, strict=True) if pair[0].data_ptr() != pair[1].data_ptr()]
        for weight, place in moved:
            weight.data = place
        return bool(moved)

    @property
    def _room(self) -> int:
        """Bytes that a step of the optimizer takes beside the graphs."""
        return WORK if self.host else ROOM * sum(place.nbytes for place in self._gradients.values())

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def why_plain(config: TrainConfig, accelerator: Accelerator, denoiser: nn.Module) -> str:
    """Why passes are to run as they are; empty where they may be graphs."""
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
    hooked = next((name for name, module in denoiser.named_modules() if _is_hooked(module)), None)
    if hooked is not None:
        return f"a hook of accelerate or diffusers moves or casts {hooked or 'the model'}"
    return ""


def _is_hooked(module: nn.Module) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return getattr(module, "_hf_hook", None) is not None or bool(hooks)


def _sizes(loss: Tensor, parameters: Sequence[Tensor]) -> list[float]:
    """The loss, and the norms of the gradients. Waits for the device."""
    norms = torch._foreach_norm([one.grad for one in parameters if one.grad is not None])
    return torch.stack([loss, *norms]).tolist()


def _finite(size: float) -> bool:
    return abs(size) < float("inf")


def _difference(expected: Sequence[float], found: Sequence[float]) -> str:
    """Of `_sizes`, where it is more than rounding; else nothing."""
    (loss, *norms), (other, *others) = expected, found
    least = NEGLIGIBLE * max(norms)
    pairs = [(abs(loss), abs(loss - other)), *((max(one, least), abs(one - two)) for one, two in zip(norms, others, strict=True))]
    worst = max((difference / size if size else difference for size, difference in pairs), key=lambda one: (one != one, one))
    if worst <= BOUND:
        return ""
    return f"a graph's loss or gradients differ from those of the pass by {worst:.2g} of their size"
