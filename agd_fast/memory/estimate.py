"""How much memory training an adapter takes, by what is kept for the backward pass. Counted on the meta device, without a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import armed, attach, attachment_of, component_of, require_attachment, spec_of, uncompiled, unload
from agd_fast.forward import device_of, nest
from agd_fast.freezing import differentiable
from agd_fast.memory.blocks import checkpointing, has_blocks
from agd_fast.memory.counting import FusedAttention, Live, run_backward, saving, storages_of
from agd_fast.memory.frozen_backward import frozen_backward
from agd_fast.memory.modes import WITHIN_BLOCKS
from agd_fast.memory.streaming import streamable, two_largest_layers
from agd_fast.memory.twin import arguments_of, meta_twin, pack_twin
from agd_fast.memory.weight_codes import Kind
from agd_fast.spec import DenoiserSpec

if TYPE_CHECKING:
    from rich.table import Table

OFF, CHECKPOINTING, BLOCKS = "off", "checkpointing", "blocks"
MODES = (OFF, CHECKPOINTING, "exact", "8bit", "4bit", "recompute", BLOCKS)
STATES, STREAMED = "states", "streamed"
OPTIMIZERS = {"adamw": 2, "host": 0}  # number of moments on the card, each as large as the parameters
TOP = 6  # ops that a table shows
_UNITS = {"MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class MemoryRow:
    """What one way to train takes, in bytes.

    weights: of the base.
    adapters, gradients, optimizer: of the trained parameters.
    activations: what a forward pass keeps for its backward pass.
    by_op: the same, by the op that keeps it.
    working: the most that forward and backward hold at any moment besides all that.
    total: the sum. The CUDA context, what the allocator cannot use, and text encoders and a VAE come on top.
    """

    mode: str
    weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    by_op: Mapping[str, int] = field(repr=False)

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.gradients + self.optimizer + self.activations + self.working


@dataclass(frozen=True)
class MemoryEstimate:
    """Estimates with one row per mode; modes that keep more come first.

    title: what was estimated.
    states: memory for collecting guided states and measuring an adapter. This takes forward passes of the base as it is, without
        gradients, with one of the models on the card at a time; `weights` are those of the largest model.
    streamed: the same if weights come from host memory one layer at a time; `weights` are then those of two layers, or all of
        them for a model that cannot be streamed.
    """

    title: str
    rows: tuple[MemoryRow, ...]
    states: MemoryRow
    streamed: MemoryRow

    def row(self, mode: str) -> MemoryRow:
        """The row of a mode. Raises: ValueError for a mode that was not estimated."""
        for row in self.rows:
            if row.mode == mode:
                return row
        raise ValueError(f"mode must be one of {', '.join(row.mode for row in self.rows)}; found {mode!r}")

    def fits(self, budget: int) -> tuple[str, ...]:
        """Modes whose total is within `budget` bytes, in the order of the rows; none if states cannot be collected within it."""
        return tuple(row.mode for row in self.rows if max(row.total, self.streamed.total) <= budget)

    def rich(self) -> Table:
        """A table with one column per mode, in GiB, or in MiB if everything is small.

        Of the activations, it shows the ops that keep most.
        """
        from agd_fast.reporting.tables import rich_table

        parts = ("weights", "adapters", "gradients", "optimizer", "activations")
        table = rich_table(self.title, (self._unit, *(row.mode for row in self._all)), [self._line(part) for part in parts])
        for name in self._top():
            table.add_row(f"  {name}", *(self._size(row.by_op.get(name, 0)) for row in self._all), style="dim")
        table.add_row(*self._line("working"))
        table.add_row(*self._line("total"), style="bold")
        return table

    def _line(self, part: str) -> tuple[str, ...]:
        return (part, *(self._size(getattr(row, part)) for row in self._all))

    @property
    def _all(self) -> tuple[MemoryRow, ...]:
        return (*self.rows, self.states, self.streamed)

    @property
    def _unit(self) -> str:
        return "GiB" if max(row.total for row in self._all) >= _UNITS["GiB"] / 10 else "MiB"

    def _size(self, size: int) -> str:
        return f"{size / _UNITS[self._unit]:.3f}"

    def _top(self) -> list[str]:
        """The ops that keep most, each by the most that it keeps in any mode."""
        most: dict[str, int] = {}
        for row in self.rows:
            for name, size in row.by_op.items():
                most[name] = max(size, most.get(name, 0))
        return sorted(most, key=lambda name: -most[name])[:TOP]

    def __str__(self) -> str:
        from rich.console import Console

        table = self.rich()
        table.title = None  # it would be wrapped to the table's width
        console = Console(file=io.StringIO(), width=140)
        console.print(table)
        return f"{self.title}\n{console.file.getvalue().rstrip()}"  # type: ignore[attr-defined]


def estimate_memory(
    model: Any,
    *,
    resolution: int | tuple[int, int] | None = None,
    batch_size: int = 1,
    adapter: AdapterConfig | None = None,
    modes: Sequence[str] | None = None,
    base_weights: Kind | None = None,
    optimizer: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    spec: DenoiserSpec | None = None,
) -> MemoryEstimate:
    """Estimate the memory that training an adapter takes, for a Teacher, a denoiser, or the first denoiser of a pipeline.

    The model itself is left alone. Its twin runs on the meta device: the same modules without their weights. For a large model,
    this takes some seconds per mode.

    resolution: edge length of the pictures in pixels, or (height, width); None takes the model's own.
    adapter: None takes the adapter that is attached, else the backbone's default.
    modes: "off" (plain autograd), "checkpointing", "exact", "8bit", "4bit", "recompute", "blocks"; None takes all that the
        denoiser has.
    base_weights: "int8" or "nf4" holds the base's weights as `distill(base_weights=...)` does.
    optimizer: "adamw", or "host" with its moments in host memory. None takes what `distill` does: "host" in all modes but "off"
        and "checkpointing".
    inputs: arguments of the denoiser's own call, by (dotted) name, which then decide resolution and batch size: tensors, of which
        only shape and dtype count, or shapes including the batch.
    call: further arguments of a pipeline's call, such as num_frames.
    Raises: ValueError for an unknown mode, or an argument whose shape cannot be determined; TypeError for an unknown denoiser.
    """
    for name, found, expected in (("base_weights", base_weights, get_args(Kind)), ("optimizer", optimizer, OPTIMIZERS)):
        if found is not None and found not in expected:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, expected))} or None; found {found!r}")
    spec = spec_of(model, spec)
    twin = meta_twin(uncompiled(component_of(model)))
    chosen = chosen_modes(twin, modes)
    prepare_adapter(twin, adapter, spec)
    arguments = arguments_of(model, spec, resolution=resolution, batch_size=batch_size, inputs=inputs, call=call)
    components = [one for one in getattr(model, "components", {}).values() if isinstance(one, nn.Module)]
    states, streamed = states_memory(twin, spec, arguments, components or [twin])
    if base_weights is not None:
        pack_twin(twin, base_weights)
    trained = sum(parameter.numel() for parameter in require_attachment(twin).adapter.parameters())
    weights, adapters = _bytes(twin), _bytes(require_attachment(twin).adapter)
    rows = []
    for mode in chosen:
        scope, plans = partial(keeping, mode=mode), mode not in (OFF, CHECKPOINTING)
        saved, working = count(twin, spec, arguments, scope, plans=plans)
        held = OPTIMIZERS[optimizer or ("adamw" if mode in (OFF, CHECKPOINTING) else "host")]
        rows.append(MemoryRow(mode, weights, adapters, adapters, held * adapters, sum(saved.values()), working, saved))
    samples = arguments[spec.sample]
    shape = "×".join(map(str, (len(samples), *samples[0].shape)))
    kind = require_attachment(twin).adapter.config.kind
    title = f"{type(twin).__name__}, {kind}, {shape}, {trained:,} trained parameters"
    return MemoryEstimate(title, tuple(rows), states, streamed)


def states_memory(
    twin: nn.Module, spec: DenoiserSpec, arguments: Mapping[str, Any], models: Iterable[nn.Module]
) -> tuple[MemoryRow, MemoryRow]:
    """The rows `states` and `streamed` of a MemoryEstimate.

    twin: an adapted denoiser on meta. models: all that take turns on the card.
    Raises: ValueError if the denoiser's forward does not run on meta.
    """
    adapters, working = _bytes(require_attachment(twin).adapter), count_forward(twin, spec, arguments)
    weights = [(_bytes(model), two_largest_layers(model) if streamable(model) else _bytes(model)) for model in models]
    kinds = ((STATES, max(whole for whole, _ in weights)), (STREAMED, max(layers for _, layers in weights)))
    states, streamed = (MemoryRow(mode, held, adapters, 0, 0, 0, working, {}) for mode, held in kinds)
    return states, streamed


def chosen_modes(denoiser: nn.Module, modes: Sequence[str] | None) -> tuple[str, ...]:
    """The modes to estimate, in the order of MODES. Raises: ValueError for a mode that is unknown or that the denoiser lacks."""
    known = tuple(mode for mode in MODES if mode not in (CHECKPOINTING, BLOCKS) or has_blocks(denoiser))
    for mode in modes or ():
        if mode not in known:
            raise ValueError(f"modes must be of {', '.join(known)} for a {type(denoiser).__name__}; found {mode!r}")
    return known if modes is None else tuple(mode for mode in known if mode in modes)


def prepare_adapter(twin: nn.Module, adapter: AdapterConfig | None, spec: DenoiserSpec) -> None:
    """Attach the adapter that is to be trained; if None is given, an attached one stays."""
    if attachment_of(twin) is not None and adapter is not None:
        unload(twin)
    if attachment_of(twin) is None:
        attach(twin, adapter, spec=spec)


@contextmanager
def _without_values(denoiser: nn.Module) -> Iterator[None]:
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        raise ValueError(
            f"the forward of a {type(denoiser).__name__} asks for values of tensors, which there are none of without its "
            f"weights: expected a denoiser that runs on the meta device ({str(error).splitlines()[0][:120]})"
        ) from error


def count_forward(denoiser: nn.Module, spec: DenoiserSpec, arguments: Mapping[str, Any]) -> int:
    """Peak bytes of a forward of an adapted denoiser without gradients, including its arguments.

    Raises: ValueError if it does not run on meta.
    """
    attachment = require_attachment(denoiser)
    live = Live([denoiser, attachment.adapter])
    with _without_values(denoiser), torch.no_grad(), armed(attachment, _omega(denoiser, spec, arguments)), FusedAttention(), live:
        live.add(list(arguments.values()))
        denoiser(**nest(arguments))
    return live.peak()


def count(
    denoiser: nn.Module,
    spec: DenoiserSpec,
    arguments: Mapping[str, Any],
    scope: Callable[[nn.Module], AbstractContextManager[Any]],
    *,
    plans: bool = True,
) -> tuple[dict[str, int], int]:
    """Bytes that a forward of an adapted, frozen denoiser keeps, by op, largest first; and bytes of working memory.

    scope: gives the context to run in. plans: whether the first forward in it plans what later ones keep; the second is counted.
    Raises: ValueError if it does not run on meta.
    """
    attachment = require_attachment(denoiser)
    adapter = attachment.adapter
    call = {**nest(arguments), **({"return_dict": False} if "return_dict" in attachment.parameters else {})}

    def forward() -> Any:
        output = denoiser(**call)
        output = output if isinstance(output, torch.Tensor) else output[0]
        return torch.stack(output) if isinstance(output, list) else output

    omega = _omega(denoiser, spec, arguments)
    with _without_values(denoiser), scope(denoiser), differentiable(denoiser, spec), armed(attachment, omega):
        if plans:
            with saving():
                forward()
        live = Live([denoiser, adapter])
        with live, saving(denoiser, adapter) as saved:
            live.add(list(arguments.values()))
            output = forward()
        with live, FusedAttention():
            run_backward(output)
    del output
    gradients = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
    working = max(live.peak(gradients) - saved.total, 0)
    for parameter in adapter.parameters():
        parameter.grad = None
    return dict(saved.by_op.most_common()), working


def _omega(denoiser: nn.Module, spec: DenoiserSpec, arguments: Mapping[str, Any]) -> torch.Tensor:
    return torch.full((len(arguments[spec.sample]),), 3.0, device=device_of(denoiser))


def keeping(denoiser: nn.Module, mode: str) -> AbstractContextManager[Any]:
    """Inside, the denoiser keeps for backward what the mode says."""
    if mode == OFF:
        return nullcontext()
    if mode == CHECKPOINTING:
        return checkpointing(denoiser)
    if mode == BLOCKS:
        return _in_blocks(denoiser)
    return frozen_backward(denoiser, activations=mode)


@contextmanager
def _in_blocks(denoiser: nn.Module) -> Iterator[None]:
    with checkpointing(denoiser), frozen_backward(denoiser, activations=WITHIN_BLOCKS):
        yield


def _bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum({storage._cdata: storage.nbytes() for storage in storages_of([module])}.values())
