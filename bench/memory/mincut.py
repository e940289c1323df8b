"""What torch.compile keeps for backward: its min-cut partitioner on the joint graph of AOTAutograd. Nothing is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule, Node

from agd_fast.attaching import armed, require_attachment
from agd_fast.forward import nest
from agd_fast.memory.counting import FusedAttention
from agd_fast.spec import DenoiserSpec


class _Trained(nn.Module):
    """A denoiser and its adapter as one module that takes only tensors. constants: the arguments that are not tensors."""

    def __init__(self, denoiser: nn.Module, names: list[str], constants: Mapping[str, Any]) -> None:
        super().__init__()
        self.denoiser, self.adapter = denoiser, require_attachment(denoiser).adapter
        self.names, self.constants = names, constants

    def forward(self, omega: Tensor, *tensors: Tensor) -> Tensor:
        call = nest({**dict(zip(self.names, tensors, strict=True)), **self.constants})
        with armed(require_attachment(self.denoiser), omega):
            return self.denoiser(**call, return_dict=False)[0]


def count_mincut(denoiser: nn.Module, spec: DenoiserSpec, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Bytes kept by one forward of an adapted denoiser on meta, by the operation that made them."""
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    constants = {name: value for name, value in arguments.items() if name not in tensors}
    module = _Trained(denoiser, list(tensors), constants)
    found: list[Graph] = []

    def keep(graph: GraphModule, example_inputs: Any) -> GraphModule:
        found.append(graph.graph)
        return graph

    compiled = aot_module(
        module,
        fw_compiler=keep,
        bw_compiler=lambda graph, example_inputs: graph,
        partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
        decompositions=select_decomp_table(),
    )
    omega = torch.full((len(tensors[spec.sample]),), 3.0, device="meta")
    weights = sum(1 for _ in (*module.named_parameters(), *module.named_buffers()))
    with FusedAttention():
        compiled(omega, *tensors.values())
    return _saved(found[0], weights)


def _saved(graph: Graph, weights: int) -> dict[str, int]:
    """weights: how many of the first placeholders are parameters and buffers."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    seen = {_storage(node) for node in placeholders[:weights]}
    by_op: Counter[str] = Counter()
    for node in graph.output_node().args[0][1:]:  # type: ignore[index, union-attr]
        if isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor) and _storage(node) not in seen:
            seen.add(_storage(node))
            by_op[_name(node)] += node.meta["val"].untyped_storage().nbytes()
    return dict(by_op.most_common())


def _storage(node: Node) -> Any:
    value = node.meta["val"]
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _name(node: Node) -> str:
    if node.op == "placeholder":
        return "input"
    target: Any = node.args[0].target if "getitem" in str(node.target) and isinstance(node.args[0], Node) else node.target
    return getattr(target, "__name__", str(target)).partition(".")[0]
