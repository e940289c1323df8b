"""One forward of a denoiser as a graph of its operations, a pure function of tensors.

The operations are recorded from a forward on fake tensors, with the adapter's hooks inside; nothing is computed. Everything
other than tensors (shapes, flags, LoRA scales) is a constant of the graph: `agd_fast.engine.fingerprint` notices its changes.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from agd_fast.warning import described

_RECORDING = threading.RLock()  # make_fx needs the process's modes to itself, and patches nn.Module for all threads
_MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")  # calls that switch what is off here anyway


class NotCapturableError(Exception):
    """Why a forward cannot be a graph."""


@dataclass(frozen=True)
class Captured:
    """graph: has placeholders for inputs, in order, then for constants. constants: what it reads of the model, by placeholder."""

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    constants: dict[fx.Node, Tensor]


def capture(function: Callable[..., list[Tensor]], inputs: Iterable[Tensor]) -> Captured:
    """The graph of `function(*inputs)`, which returns a list of tensors.

    Raises: NotCapturableError, for example for code that asks for the values of tensors.
    """
    inputs = list(inputs)
    try:
        with _RECORDING:
            module = make_fx(function, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:  # whatever the code of a model may raise on tensors without values
        raise NotCapturableError(f"its forward cannot be recorded ({described(error)})") from error
    graph = module.graph
    _drop_modes(graph)
    _cast_by_dtype(graph)
    constants = _constants_as_inputs(graph, module)
    _require_nothing_hidden(graph)
    graph.owning_module = None  # it would keep the constants for as long as the graph
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return Captured(graph, tuple(placeholders[: len(inputs)]), constants)


def schema_name(node: fx.Node) -> str:
    """The name of the operator that a node calls, such as "aten::add"; empty for other nodes."""
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name


def value_of(node: fx.Node) -> Any:
    """The fake tensor, or other value, that the node stands for."""
    return node.meta.get("val")


def arguments_of(node: fx.Node, *defaults: Any) -> list[Any]:
    """Its positional arguments, completed from `defaults`, which has one for each position."""
    return [*node.args, *defaults[len(node.args) :]]


def kind_of(node: fx.Node) -> Any:
    """dtype, device, shape and strides of a tensor."""
    return kind_of_value(value_of(node))


def kind_of_value(value: Any) -> Any:
    return (value.dtype, value.device, value.shape, value.stride()) if isinstance(value, Tensor) else value


def add_call(graph: fx.Graph, target: Any, *args: Any, **flags: Any) -> fx.Node:
    """Add a call of an operator at the graph's insertion point. `args` may contain nodes and lists of nodes, `flags` none."""
    node = graph.call_function(target, args, flags)
    values = fx.node.map_arg(args, value_of)
    with fake_mode_of(values):
        node.meta["val"] = target(*values, **flags)
    return node


def fake_mode_of(values: Any) -> AbstractContextManager[Any]:
    """A context in which operations on these fake tensors give fake tensors."""
    return next((one.fake_mode for one in pytree.tree_leaves(values) if isinstance(one, FakeTensor)), nullcontext())


def sort(graph: fx.Graph) -> None:
    """Move each node that stands before one of its inputs behind them; all others keep their order."""
    there: set[fx.Node] = set()
    waiting: list[fx.Node] = []
    previous = next(iter(graph.nodes))
    for node in list(graph.nodes):
        waiting.append(node)
        for one in list(waiting):
            if all(needed in there for needed in one.all_input_nodes):
                waiting.remove(one)
                there.add(one)
                if one is not node:
                    previous.append(one)
                previous = one


def _require_nothing_hidden(graph: fx.Graph) -> None:
    """Raises: NotCapturableError for what writes to memory without a schema that says so."""
    for node in graph.nodes:
        if isinstance(node.target, HigherOrderOperator):  # such as a Triton kernel of the model's own
            raise NotCapturableError(f"its forward calls {node.target}, which does not say what it writes to")
        if schema_name(node) in ("aten::batch_norm", "aten::instance_norm") and node.args[3] is not None and node.args[5]:
            raise NotCapturableError("its forward updates the statistics of a norm")


def _drop_modes(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and getattr(node.target, "__name__", "") in _MODES:
            if node.target.__name__ == "_enter_autocast" and node.args[2]:
                raise NotCapturableError("its forward switches autocast on")
            if node.target.__name__ == "_set_grad_enabled" and node.args[0] and not torch.is_grad_enabled():
                raise NotCapturableError("its forward switches gradients on")
            graph.erase_node(node)


def _cast_by_dtype(graph: fx.Graph) -> None:
    """Make x.type_as(y) a cast to y's dtype, which does not need y: y may change with x_t where x does not."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.type_as.default):
        x, y = map(value_of, node.all_input_nodes) if len(node.all_input_nodes) == 2 else (None, None)
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.device == y.device:
            node.target, node.args = torch.ops.aten.to.dtype, (node.args[0], y.dtype)


def _constants_as_inputs(graph: fx.Graph, module: fx.GraphModule) -> dict[fx.Node, Tensor]:
    constants: dict[int, tuple[Tensor, fx.Node]] = {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = operator.attrgetter(node.target)(module)
        if not isinstance(tensor, Tensor):
            raise NotCapturableError(f"its forward has an inner graph ({node.target})")
        if id(tensor) not in constants:
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(constants)}")
            last.meta["val"] = node.meta.get("val", tensor)
            constants[id(tensor)] = tensor, last
        node.replace_all_uses_with(constants[id(tensor)][1])
        graph.erase_node(node)
    return {node: tensor for tensor, node in constants.values()}
