"""What a captured forward takes for granted about its model, so that changes are noticed.

Weights are compared by identity, version, address and dtype; modules, hooks and processors by identity; flags and scales (LoRA's
among them) by value. A write through `tensor.data` changes no version. Between runs nothing depends on it, because nothing
computed ahead outlives a run; inside a run torch itself cannot tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor, nn

from agd_fast.attaching.attachment import ROOT, SITES
from agd_fast.attaching.foreign import mover
from agd_fast.attaching.hooks import change_argument, change_output, finish_forward, prepare_forward
from agd_fast.attaching.scope import SCOPE

_OUR_HOOKS = (change_argument, change_output, finish_forward, prepare_forward)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OURS = (ROOT, SITES, SCOPE)
_OF_CALLS = (SCOPE, "_compiled_call_impl")  # attributes of an optimized denoiser that its calls change themselves
_OF_NO_FORWARD = ("_backward", "_state_dict", "_load_state_dict", "_forward_hooks_", "_forward_pre_hooks_", "_non_persistent")
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEPTH = 3  # of containers and objects inside attributes


class Fingerprint:
    """A model as it is now. It keeps alive what it refers to, so that no identity is reused by another object."""

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self.roots = list(roots)
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self.containers: list[Collection[Any]] = []  # live: they show what is in them when they are read
        for root in self.roots:
            for module in root.modules():
                self.modules.append(module)
                self._take_attributes(module, is_root=module is root)
        self.lengths, self.contents = self._inside()
        self.types = list(map(type, self.modules))
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self.state = self._state()

    def holds(self, roots: Iterable[nn.Module]) -> bool:
        """Whether the model still consists of these roots, and is unchanged."""
        if list(map(id, roots)) != list(map(id, self.roots)):
            return False
        if list(map(type, self.modules)) != self.types or self._state() != self.state:
            return False
        if [*map(len, self.containers)] != self.lengths:
            return False
        if all(map(is_, chain.from_iterable(self.containers), self.contents)):  # thousands of entries, hence no loop in Python
            return True
        _, found = self._inside()
        same = all(map(_equal, found, self.contents))
        if same:
            self.contents = found
        return same

    def _state(self) -> list[Any]:
        """What a write, a move or a cast changes about tensors. It may be read before every forward, so it must be cheap."""
        versions = [tensor._version for tensor in self.counted]
        return [*versions, *[tensor.data_ptr() for tensor in self.tensors], *[tensor.dtype for tensor in self.tensors]]

    def _inside(self) -> tuple[list[int], list[Any]]:
        """The length of each container, and the contents of all."""
        return [*map(len, self.containers)], [*chain.from_iterable(self.containers)]

    def _take_attributes(self, module: nn.Module, is_root: bool) -> None:
        attributes = vars(module)
        self.containers.append(_WithoutCalls(attributes) if is_root else attributes.values())
        for name, value in attributes.items():
            if name not in (*_OURS, *_OF_CALLS) and not name.startswith(_OF_NO_FORWARD):
                self._take(value, DEPTH)

    def _take(self, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, (nn.Module, *_PLAIN)) or not depth:
            return  # modules are looked at by themselves, plain values in the container that holds them
        elif isinstance(value, (dict, list, tuple, set, frozenset)):
            contents = value.values() if isinstance(value, dict) else value
            self.containers.append(contents)
            for inner in contents:
                self._take(inner, depth - 1)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._take(value.__dict__, depth)


def obstacle(root: nn.Module) -> str:
    """Why this model's forward cannot be a graph, as far as its modules show; empty where they show no reason."""
    for name, module in root.named_modules():
        where = f"{name or 'the denoiser'} ({type(module).__name__})"
        if hook := mover(module):
            return f"{hook} acts on {where}: switch its offloading, caching or casting off"
        if module is not root and module._compiled_call_impl is not None:
            return f"{where} is compiled by itself"
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values() if hook not in _OUR_HOOKS]
        if hooks:
            return f"{where} has a hook that is not ours ({getattr(hooks[0], '__qualname__', hooks[0])})"
    for name, tensor in (*root.named_parameters(), *root.named_buffers()):
        if tensor.is_inference():
            return f"{name} was made in torch.inference_mode, so that changes of it cannot be seen"
    return ""


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


class _WithoutCalls:
    """Attributes except those that calls change themselves."""

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        self.attributes = attributes

    def __iter__(self) -> Iterator[Any]:
        return (value for name, value in self.attributes.items() if name not in _OF_CALLS)

    def __len__(self) -> int:
        return len(self.attributes) - sum(name in self.attributes for name in _OF_CALLS)

    def __contains__(self, value: Any) -> bool:
        return any(value is one for one in self)


def _equal(one: Any, other: Any) -> bool:
    """Whether both are the same object, equal plain values, or equal containers of these."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, (*_PLAIN, set, frozenset)) and (one == other or (one != one and other != other))
