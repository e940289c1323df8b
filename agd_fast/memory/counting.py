"""Bytes that a forward keeps for its backward, and bytes alive at once: on any device, and on meta without computing."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

_ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
_flash = torch.ops.aten._scaled_dot_product_flash_attention
_efficient = torch.ops.aten._scaled_dot_product_efficient_attention
_CHECKPOINT = torch.utils.checkpoint.__file__


class FusedAttention(TorchFunctionMode):
    """On meta, replaces attention by the fused kernel that CUDA runs for it; torch would decompose it there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attention if func in _ATTENTION else func)(*args, **(kwargs or {}))


class _Names(TorchFunctionMode):
    """Tracks the name of the outermost torch function that is running, or of the torch.autograd.Function class being applied."""

    current = "other"

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        previous, self.current = self.current, getattr(func, "__name__", "other").strip("_")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = previous

    @contextmanager
    def of_classes(self) -> Iterator[None]:
        """Neither modes of torch nor, from torch 2.15 on, stack frames show these: inside, `Function.apply` sets their names."""
        plain = Function.__dict__["apply"]

        def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
            previous, self.current = self.current, cls.__name__
            try:
                return plain.__get__(None, cls)(*args, **kwargs)
            finally:
                self.current = previous

        Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Function.apply = plain  # type: ignore[method-assign]


class _Holder:
    """What autograd holds in place of a tensor; it is freed with the node that keeps it."""

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.tensor, self.name = tensor, name


class SavedBytes:
    """What autograd keeps at the end of a forward: each storage once, under the op that kept it first; no parameters or buffers.

    by_op: bytes by the name of a function of torch, or of a class of torch.autograd.Function.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.by_op: Counter[str] = Counter()
        self._names = _Names()
        self._left_out = {storage._cdata for storage in storages_of(modules)}
        self._holders: list[weakref.ref[_Holder]] = []

    @property
    def total(self) -> int:
        return self.by_op.total()

    def pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(tensor, self._name(sys._getframe(1)))
        self._holders.append(weakref.ref(holder))
        return holder

    def count(self) -> None:
        """Count what has not been freed."""
        seen = set(self._left_out)
        for holder in filter(None, (reference() for reference in self._holders)):
            for storage in _storages(holder.tensor):
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    self.by_op[holder.name] += storage.nbytes()

    def _name(self, frame: Any) -> str:
        checkpointed = frame.f_code.co_filename == _CHECKPOINT or self._names.current == "_NoopSaveInputs"  # before torch 2.13
        return "checkpointed inputs" if checkpointed else self._names.current


@contextmanager
def saving(*modules: nn.Module) -> Iterator[SavedBytes]:
    """Counts what forwards inside keep for their backward, besides parameters and buffers of `modules`; complete when it ends.

    On meta, attention counts as the fused kernel.
    """
    saved = SavedBytes(modules)
    with FusedAttention(), saved._names, saved._names.of_classes(), torch.autograd.graph.saved_tensors_hooks(saved.pack, _unpack):
        yield saved
    saved.count()


def _unpack(holder: _Holder) -> Tensor:
    return holder.tensor


class Live(TorchDispatchMode):
    """Tracks the bytes of all storages that are created inside it, until they are freed."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        super().__init__()
        self._known: dict[int, int] = {}  # storage → its number
        self._left_out = {storage._cdata for storage in storages_of(modules)}
        self._events: list[tuple[int, int]] = []  # number of a storage, bytes allocated or (negative) freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.add(output)
        return output

    def add(self, tensors: Any) -> None:
        """Count these tensors; they may have been created before."""
        for storage in (storage for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor) for storage in _storages(leaf)):
            key = storage._cdata
            if key not in self._known and key not in self._left_out:
                number = self._known[key] = len(self._events)
                self._events.append((number, storage.nbytes()))
                weakref.finalize(storage, self._free, key, number, storage.nbytes()).atexit = False

    def _free(self, key: int, number: int, nbytes: int) -> None:
        self._known.pop(key, None)
        self._events.append((number, -nbytes))

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """The most bytes alive at once, not counting the tensors `without`, which must still be alive."""
        left_out = {self._known.get(tensor.untyped_storage()._cdata) for tensor in without}
        now = most = 0
        for number, change in self._events:
            if number not in left_out:
                now += change
                most = max(most, now)
        return most


def run_backward(output: Tensor) -> None:
    """`output.backward(...)` with an arbitrary gradient, leaving torch function modes on, which `backward` would turn off:
    checkpointed parts run again in it."""
    gradient = torch.empty_like(output) if output.is_meta else torch.ones_like(output)
    torch.autograd.graph._engine_run_backward(
        (output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def storages_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The storages of all parameters and buffers."""
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return [storage for tensor in tensors for storage in _storages(tensor)]


def _storages(tensor: Tensor) -> list[Any]:
    """The tensor's storage, or those of the tensors that a subclass wraps."""
    if is_traceable_wrapper_subclass(tensor):
        return [one for name in tensor.__tensor_flatten__()[0] for one in _storages(getattr(tensor, name))]
    return [tensor.untyped_storage()]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention as the kernel that CUDA picks for it: flash, or with a mask the memory-efficient one."""
    if query.device.type != "meta" or enable_gqa:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if attn_mask is None:
        return _flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    bias = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return _efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
