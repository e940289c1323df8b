"""A graph from Dynamo, rewritten where that helps, and compiled by inductor."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from agd_fast.backend.once import Once
from agd_fast.backend.torch_versions import (
    CompiledFn,
    compile_with,
    has_symbols,
    inductor_options,
    is_weight,
    outside_of_dynamo,
)
from agd_fast.graph.capture import Captured, NotCapturableError, add_call, capture
from agd_fast.graph.levels import Level, is_view
from agd_fast.graph.partition import Part, partition
from agd_fast.graph.rewriting import Rewritten, rewrite
from agd_fast.ops import Kernels, checked_policy, default_policy
from agd_fast.warning import described, warn

aten = torch.ops.aten

_graphs: deque[dict[str, Any]] = deque(maxlen=64)


def agd_fast(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> CompiledFn:
    """What torch.compile calls with a graph; not for calling oneself.

    mode: of torch.compile, but for those that record CUDA graphs. options: "kernels" ("auto", "always", "never"; default: what
    AGD_FAST_KERNELS says, else "auto"), "compiler" (the backend underneath, default "inductor"); all others go to inductor.

    Pieces that agd_fast has kernels for are put on these where they are faster, and thin projections, as adapters have them, ride
    along with wider ones. A graph with none of these goes to inductor as it is; so do graphs for training, under autocast, and
    for more than one shape.
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
            except Exception as error:  # it costs no model: no memory for joined weights, perhaps
                reason = f"it could not be rewritten ({described(error)})"
                warn(f"a graph goes to {compiler} as it is: {reason}")
    _graphs.append(_told(Rewritten(), reason))
    return compile_with(compiler, gm, example_inputs, options)


def graphs_info() -> list[dict[str, Any]]:
    """What became of the last graphs, for a reader. kernels, not_on_kernels: pieces by op, and by op and reason. joined: thin
    projections that ride along with others. gelu_epilogues: those that end with their gelu. untouched_because: why a graph went
    to the compiler as it was, or empty."""
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
    rewritten = rewrite(graph, levels, policy, lambda pieces: _joined(graph, pieces), gelu_epilogue="auto")
    _require_changed(rewritten)
    views = frozenset(node for node in graph.nodes if node.op == "call_function" and is_view(node))  # free where they are
    parts = partition(graph, levels, rewritten.kept | views)
    compiled = _assembled(captured, parts.once, parts.body, inputs, compiler, options)
    _graphs.append(_told(rewritten, ""))
    return compiled


def _require_changed(rewritten: Rewritten) -> None:
    if not rewritten.kernels["kernels"] and not rewritten.joined and not rewritten.gelu_epilogues:
        refused = ", ".join(rewritten.kernels["not_on_kernels"])
        raise _UntouchedError(f"no kernel of ours is to run in it{f' ({refused})' if refused else ''}")


def _told(done: Rewritten, untouched_because: str) -> dict[str, Any]:
    counts = {"joined": done.joined, "gelu_epilogues": done.gelu_epilogues}
    return {**done.kernels, **counts, "untouched_because": untouched_because}


def _assembled(
    captured: Captured,
    once_part: Part,
    body: Part,
    inputs: Sequence[Tensor],
    compiler: str,
    options: dict[str, Any],
) -> CompiledFn:
    """What runs: the part of the weights, where they are not the same as before, and the compiled rest."""
    constants, places = captured.constants, {node: index for index, node in enumerate(captured.inputs)}
    once = Once(once_part, [constants[node] if node in constants else places[node] for node in once_part.arguments])

    def arguments(given: Sequence[Tensor]) -> list[Tensor]:
        values = {**constants, **dict(zip(once_part.results, once(given), strict=True))}
        return [values[node] if node in values else given[places[node]] for node in body.arguments]

    with torch.no_grad():
        compiled = compile_with(compiler, body.module, arguments(inputs), options)
    return lambda *given: compiled(*arguments(given))


def _joined(graph: fx.Graph, pieces: Sequence[fx.Node | int]) -> fx.Node:
    """A `cat` of weights, behind the last of them."""
    like = next(piece for piece in pieces if not isinstance(piece, int))
    first = next(node for node in graph.nodes if node.op != "placeholder")
    last = max(piece for piece in pieces if not isinstance(piece, int))
    with graph.inserting_before(first if last < first else last.next):
        nodes = [add_call(graph, aten.new_zeros.default, like, [one]) if isinstance(one, int) else one for one in pieces]
        return add_call(graph, aten.cat.default, nodes)
