"""Frozen weights kept as 8- or 4-bit codes while an adapter is trained; afterwards the originals are restored bit for bit.

A weight is unpacked only for the product that reads it: the forward pass and the input's gradient each unpack it anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves, tree_map

from agd_fast.forward import device_of
from agd_fast.memory.convolution import input_gradient
from agd_fast.memory.weight_codes import Kind, pack_weight, unpack_weight
from agd_fast.warning import first_line, warn

_SMALLEST_FAN_IN = 32  # below it the scales eat what the codes save
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PackedWeight(Tensor):
    """A weight as codes and scales; to the code that uses it, a tensor with the weight's shape and dtype.

    kind: "int8" has one scale per output channel: w ≈ codes · scales; "nf4" has one per block of 64 in memory order (QLoRA,
    arXiv 2305.14314). F.linear and F.conv1d … F.conv3d keep it packed for backward and unpack it once in forward and once in
    backward; everything else gets it unpacked.
    """

    codes: Tensor
    scales: Tensor
    kind: Kind

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, kind: Kind, size: torch.Size, dtype: torch.dtype) -> PackedWeight:
        strides = codes.stride() if kind == "int8" else None
        made = Tensor._make_wrapper_subclass(cls, size, strides, dtype=dtype, device=codes.device)
        made.codes, made.scales, made.kind = codes, scales, kind
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.kind}, {tuple(self.shape)}, {self.dtype}, device={self.device})"

    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, [*shape]; computed anew each time."""
        return unpack_weight(self.codes, self.scales, self.kind, self.shape, dtype or self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scales"], (self.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> PackedWeight:
        kind, dtype = context
        return PackedWeight(inner["codes"], inner["scales"], kind, torch.Size(size), dtype)

    def _with(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> PackedWeight:
        return PackedWeight(change(self.codes), change(self.scales), self.kind, self.shape, dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            call = _PRODUCTS[func](*args, **kwargs)
            if isinstance(call.weight, PackedWeight):
                return _product(call)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        packet, first = func.overloadpacket, args[0] if args else None
        if isinstance(first, PackedWeight):
            if packet in (torch.ops.aten.detach, torch.ops.aten.alias):
                return first._with(lambda part: part)
            if packet is torch.ops.aten._to_copy and (kwargs.get("dtype") or first.dtype).is_floating_point:
                return first._with(lambda part: part.to(kwargs.get("device"), copy=True), kwargs.get("dtype"))
            if packet is torch.ops.aten.clone:
                return first._with(torch.clone)
        if func._schema.is_mutable:
            _require_unwritten(func, args, kwargs)
        args, kwargs = tree_map(lambda value: value.unpacked() if isinstance(value, PackedWeight) else value, (args, kwargs))
        return func(*args, **kwargs)


def _require_unwritten(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises: RuntimeError where an operator would write to the unpacked copy of a weight."""
    for place, argument in enumerate(func._schema.arguments):
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        for value in tree_leaves(given) if argument.is_write else ():
            if isinstance(value, PackedWeight):
                raise RuntimeError(f"{func} would write to a weight that is kept as {value.kind}, whose codes would not follow")


@dataclass(frozen=True)
class _Product:
    """A call of F.linear or of a convolution. settings: stride, padding, dilation and groups; None for a linear."""

    function: Callable[..., Tensor]
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: tuple[Any, ...] | None = None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Product:
    return _Product(F.linear, input, weight, bias)


def _convolution(function: Callable[..., Tensor], dimensions: int) -> Callable[..., _Product]:
    def call(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> _Product:
        edges = tuple([value] * dimensions if isinstance(value, int) else list(value) for value in (stride, padding, dilation))
        return _Product(function, input, weight, bias, (*edges, groups))

    return call


_PRODUCTS: dict[Any, Callable[..., _Product]] = {
    F.linear: _linear,
    F.conv1d: _convolution(F.conv1d, 1),
    F.conv2d: _convolution(F.conv2d, 2),
    F.conv3d: _convolution(F.conv3d, 3),
}


def _product(call: _Product) -> Tensor:
    """Computed in autocast's dtype if autocast is on, as F.linear and F.conv are."""
    weight, kind = call.weight, call.input.device.type
    assert isinstance(weight, PackedWeight)
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    x, bias = call.input, call.bias
    if autocast:
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    trained = None if bias is None or not bias.requires_grad else bias
    meta = (call.function, call.settings, weight.kind, weight.shape, dtype)
    y = _PackedProduct.apply(x, None if trained is not None else bias, weight.codes, weight.scales, meta)
    if trained is None:
        return y
    return y + (trained if call.settings is None else trained.reshape(-1, *[1] * len(call.settings[0])))


class _PackedProduct(torch.autograd.Function):
    """Linear or convolution with a frozen packed weight: only the gradient of x, [..., in] or [B, C, ...], is wanted, so only
    codes and scales are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, meta: Any) -> Tensor:
        function, settings, kind, size, dtype = meta
        ctx.save_for_backward(codes, scales)
        ctx.meta, ctx.size = meta, x.shape
        return function(x, unpack_weight(codes, scales, kind, size, dtype), bias, *(settings or ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        (_, settings, kind, size, dtype), (codes, scales) = ctx.meta, ctx.saved_tensors
        weight = unpack_weight(codes, scales, kind, size, dtype)
        if settings is None:
            return dy.matmul(weight), None, None, None, None
        return input_gradient(dy, ctx.size, weight, *settings), None, None, None, None


class PackedBase:
    """The packed weights of a module, with their originals in host memory. See `packed_base`."""

    def __init__(self, module: nn.Module, kind: Kind, device: torch.device | None = None) -> None:
        self.module, self.kind, self.device = module, kind, device
        self._home = None if device is None else device_of(module)
        self._places: dict[nn.Parameter, list[nn.Module]] = {}
        self._devices: dict[nn.Parameter, torch.device] = {}
        for child in module.modules():
            if _serves(child):
                self._places.setdefault(child.weight, []).append(child)  # type: ignore[arg-type]
        if not self._places:
            raise ValueError(
                f"expected frozen linears or convolutions with weights of 16 or 32 bits to keep as {kind}, found none in this "
                f"{type(module).__name__}; one that is quantised already needs no base_weights"
            )

    def pack(self) -> None:
        """Pack one weight after another, which needs room for at most one more. On an error, everything is as before."""
        try:
            for original, children in self._places.items():
                here = original.data.to(self.device or original.device)
                packed = nn.Parameter(_packed(here, self._kind_for(children[0])), requires_grad=False)
                self._devices[original] = original.device
                for child in children:
                    child._parameters["weight"] = packed
                original.data = original.data.cpu()  # no copy if it is there already
            if self.device is not None:
                self.module.to(self.device)  # what is not packed
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the originals back.

        Warns: if the device is full by now: the weights are right, but some stay in host memory, for the owner to move.
        """
        for original in self._devices:  # free all codes before any weight comes back
            for child in self._places[original]:
                child._parameters["weight"] = original
        if self._home is not None:
            self.module.to(self._home)
        devices, self._devices = self._devices, {}
        try:
            for original, device in devices.items():
                original.data = original.data.to(device)
        except torch.OutOfMemoryError as error:
            warn(f"{device} has no room for the base's own weights now, some are left in host memory: {first_line(error)}")

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the module has its original weights."""
        self.restore()
        try:
            yield
        finally:
            self.pack()

    def _kind_for(self, child: nn.Module) -> Kind:
        return "int8" if isinstance(child, _CONVOLUTIONS) else self.kind  # NF4 breaks convolutions: gradients of cosine .6


def _packed(weight: Tensor, kind: Kind) -> PackedWeight:
    return PackedWeight(*pack_weight(weight, kind), kind, weight.shape, weight.dtype)


def _serves(child: nn.Module) -> bool:
    if not isinstance(child, (nn.Linear, *_CONVOLUTIONS)) or isinstance(getattr(child, "padding", None), str):
        return False
    weight = child._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.requires_grad or weight.device.type == "meta":
        return False  # kept in another library's format, or trained, or offloaded
    return weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) and weight[0].numel() >= _SMALLEST_FAN_IN


@contextmanager
def packed_base(module: nn.Module, kind: Kind, device: torch.device | None = None) -> Iterator[PackedBase]:
    """Inside, the frozen linears and convolutions of `module` keep their weights as codes; afterwards the weights are the same
    parameters with the same bits on the same device, whatever happened inside.

    kind: "int8" is symmetric, with one scale per output channel; "nf4" is for linears, with convolutions in int8. Weights that
        are quantised already, not frozen, on "meta" or with fewer than 32 inputs per channel are left alone. Meanwhile the
        originals are in host memory, in their full size.
    device: where the module is inside the context, if not where it was. Codes are made there one weight after another, so the
        device never has to hold all weights unpacked.
    Raises: ValueError for an unknown kind, or if there is nothing to pack.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"base_weights must be one of {get_args(Kind)} or None, found {kind!r}")
    base = PackedBase(module, kind, device)
    base.pack()
    try:
        yield base
    finally:
        base.restore()
