"""CUDA graphs where there is no CUDA: the operations that ran in a recording run again, on the memory that they had then."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# What waits for the device: no stream that records takes it.
_WAITS = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}


class HostGraph(TorchDispatchMode):
    """Records the operations inside. As a CUDA graph it holds no code of the host's, reads and writes where tensors lay, keeps
    nobody's memory but its own, and that others use between its runs: it is NaN when a run begins.

    Raises: RuntimeError for an operation that a stream does not take while it records: one that waits for the device, or copies
    from memory of the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0
        self.operations: list[tuple[Any, Any, Any, list[Tensor | None]]] = []
        self.own: dict[int, Tensor] = {}  # made inside, by memory
        self.numbers: dict[int, Tensor] = {}  # of the host's, which kernels are given by value, by memory
        self.held: dict[int, list[Tensor]] = {}  # of others' tensors, by memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name == "aten::lift_fresh" and not args[0].dim():
            self.numbers[_memory(args[0])] = args[0].detach()
            return func(*args, **kwargs)
        if name in _WAITS or name == "aten::lift_fresh" or (name in _INDEXED and _asks(args[1])):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kept_args, kept_kwargs = tree_map(self._alias, (args, kwargs))
        given = {_memory(one) for one in _tensors((args, kwargs))}
        found = func(*args, **kwargs)
        fresh = [isinstance(leaf, Tensor) and _memory(leaf) not in given for leaf in tree_leaves(found)]
        places = [leaf.detach() if own else None for leaf, own in zip(tree_leaves(found), fresh, strict=True)]
        self.own |= {_memory(place): place for place in places if place is not None}
        self.operations.append((func, kept_args, kept_kwargs, places))
        return found

    def __enter__(self) -> Any:
        torch.Tensor.tolist = torch.Tensor.numpy = _wait  # dispatched nowhere
        return super().__enter__()

    def __exit__(self, *of: Any) -> None:
        del torch.Tensor.tolist, torch.Tensor.numpy
        super().__exit__(*of)

    def _alias(self, leaf: Any) -> Any:
        """What reads a tensor's memory of now, whatever becomes of the tensor."""
        if not isinstance(leaf, Tensor):
            return leaf
        alias = leaf.detach()
        if _memory(leaf) not in self.own and _memory(leaf) not in self.numbers:
            self.held.setdefault(_memory(leaf), []).append(alias)
        return alias

    @torch.no_grad()
    def replay(self) -> None:
        """Raises: RuntimeError where memory that was others' belongs to nobody any more."""
        self.runs += 1
        gone = [aliases[0] for aliases in self.held.values() if not _holders(aliases)]
        if gone:
            raise RuntimeError(f"illegal memory access: of {[tuple(one.shape) for one in gone]} nothing is left")
        for place in self.own.values():
            if place.dtype != torch.bool:
                place.fill_(float("nan") if place.is_floating_point() or place.is_complex() else torch.iinfo(place.dtype).max)
        for func, args, kwargs, places in self.operations:
            for place, found in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
                if place is not None:
                    place.copy_(found)


def _tensors(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _wait(tensor: Tensor, *_: Any) -> None:
    raise RuntimeError("operation not permitted when stream is capturing: a tensor's values are read")


def _asks(indices: Any) -> bool:
    """Whether there are masks among them, which are asked how much they hold."""
    return any(one.dtype in (torch.bool, torch.uint8) for one in _tensors(indices))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _holders(aliases: list[Tensor]) -> int:
    """How many tensors there are beside the aliases."""
    storage = aliases[0].untyped_storage()  # one more that holds it
    return torch._C._storage_Use_Count(storage._cdata) - 1 - len(aliases)
