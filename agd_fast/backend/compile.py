"""A graph from Dynamo, rewritten where that helps, and compiled by inductor."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.backend.torch_versions import (
    CompiledFn,
    compile_with,
    has_symbols,
    inductor_options,
    is_weight,
    outside_of_dynamo,
)
from agd_fast.graph.capture import NotCapturableError, capture
from agd_fast.graph.levels import Level
from agd_fast.graph.rewriting import Rewritten, rewrite
from agd_fast.ops import Kernels, checked_policy, default_policy
from agd_fast.warning import described, warn

_graphs: deque[dict[str, Any]] = deque(maxlen=64)


def agd_fast(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> CompiledFn:
    """The backend that torch.compile calls with a graph; do not call it yourself.

    mode: the `mode` of torch.compile, except those that record CUDA graphs.
    options: "kernels" ("auto", "always", "never"; default: the value of AGD_FAST_KERNELS, else "auto") and "compiler" (the
        backend underneath, default "inductor"); all others go to inductor.

    Pieces for which agd_fast has kernels run on these, and matrix products end with their gelu, where that is faster. A graph
    with none of these goes to inductor as it is; so do graphs for training, under autocast, and for more than one shape. Weights
    are read at every call, and nothing is computed from them ahead, because nothing tells when they are written to.
    Raises: ValueError for an unknown mode or policy.
    """
    options = dict(options or {})
    policy = checked_policy(options.pop("kernels", None) or default_policy(), "options['kernels']")
    compiler = options.pop("compiler", "inductor")
    options = {**inductor_options(mode), **options}
    reason = "kernels are switched off" if policy == "never" else _foreign(example_inputs)
    if not reason:
        with outside_of_dynamo():
            try:
                return _compiled(gm, example_inputs, policy, compiler, options)
            except _UntouchedError as error:
                reason = str(error)
            except Exception as error:  # the model runs all the same
                reason = f"it could not be rewritten ({described(error)})"
                warn(f"a graph goes to {compiler} as it is: {reason}")
    _graphs.append(_told(Rewritten(), reason))
    return compile_with(compiler, gm, example_inputs, options)


def graphs_info() -> list[dict[str, Any]]:
    """What became of the last graphs, for a reader.

    kernels, not_on_kernels: number of pieces that run on kernels, by op, and of those that do not, by op and reason.
    gelu_epilogues: number of matrix products that end with their gelu.
    untouched_because: why a graph went to the compiler as it was, or empty.
    """
    return list(_graphs)


class _UntouchedError(Exception):
    """Why a graph is left as it is."""


def _foreign(inputs: Sequence[Any]) -> str:
    if torch.is_grad_enabled() and any(isinstance(one, Tensor) and one.requires_grad for one in inputs):
        return "it is for training"
    if any(map(torch.is_autocast_enabled, ("cuda", "cpu"))):
        return "it runs under autocast"
    return "it is for more than one shape, or takes no tensors" if not inputs or has_symbols(inputs) else ""


def _compiled(
    gm: fx.GraphModule, inputs: Sequence[Tensor], policy: Kernels, compiler: str, options: dict[str, Any]
) -> CompiledFn:
    try:
        captured = capture(lambda *tensors: list(gm(*tensors)), inputs)
    except NotCapturableError as error:
        raise _UntouchedError(str(error)) from error
    graph = captured.graph
    levels = {node: Level.STATIC if is_weight(one) else Level.MOVING for node, one in zip(captured.inputs, inputs, strict=True)}
    rewritten = rewrite(graph, levels, policy, gelu_epilogue="auto")
    _require_changed(rewritten)
    constants = [*captured.constants.values()]
    with torch.no_grad():
        compiled = compile_with(compiler, fx.GraphModule({}, graph), [*inputs, *constants], options)
    _graphs.append(_told(rewritten, ""))
    return lambda *given: compiled(*given, *constants)


def _require_changed(rewritten: Rewritten) -> None:
    if not rewritten.kernels["kernels"] and not rewritten.gelu_epilogues:
        refused = ", ".join(rewritten.kernels["not_on_kernels"])
        raise _UntouchedError(f"no kernel of ours is to run in it{f' ({refused})' if refused else ''}")


def _told(done: Rewritten, untouched_because: str) -> dict[str, Any]:
    return {**done.kernels, "gelu_epilogues": done.gelu_epilogues, "untouched_because": untouched_because}
