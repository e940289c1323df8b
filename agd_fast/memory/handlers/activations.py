"""Activations on their own; one whose output goes into a product is kept by the product, with the other factor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory import ops
from agd_fast.memory.handlers._norms import Affine
from agd_fast.memory.handlers.follow import follow
from agd_fast.memory.interception import Run
from agd_fast.memory.modes import Packing
from agd_fast.memory.provenance import Activation
from agd_fast.memory.saved import Kept, Saved, as_is

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
}
_aten = torch.ops.aten
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (gradient, input) → the input's gradient, as autograd computes it
    "silu": _aten.silu_backward.default,
    "gelu": _aten.gelu_backward.default,
    "gelu_tanh": partial(_aten.gelu_backward.default, approximate="tanh"),
    "sigmoid": lambda gradient, input: _aten.sigmoid_backward.default(gradient, input.sigmoid()),
    "tanh": lambda gradient, input: _aten.tanh_backward.default(gradient, input.tanh()),
    "relu": lambda gradient, input: _aten.threshold_backward.default(gradient, input.relu(), 0),
}
_FROM_OUTPUT = ("sigmoid", "tanh", "relu")  # autograd keeps their output, which what follows may keep too


def silu(run: Run, call: Callable[[], Tensor], input: Tensor, inplace: bool = False) -> Tensor:
    return call() if inplace else _activate(run, "silu", call, input)


def gelu(run: Run, call: Callable[[], Tensor], input: Tensor, *, approximate: str = "none") -> Tensor:
    return _activate(run, "gelu" if approximate == "none" else "gelu_tanh", call, input)


def sigmoid(run: Run, call: Callable[[], Tensor], input: Tensor) -> Tensor:
    return _activate(run, "sigmoid", call, input)


def tanh(run: Run, call: Callable[[], Tensor], input: Tensor) -> Tensor:
    return _activate(run, "tanh", call, input)


def relu(run: Run, call: Callable[[], Tensor], input: Tensor, inplace: bool = False) -> Tensor:
    return call() if inplace else _activate(run, "relu", call, input)


def _activate(run: Run, name: str, call: Callable[[], Tensor], input: Tensor) -> Tensor:
    """input: any shape → the same."""
    if not run.replaces(input):
        return call()
    number = run.next_activation()
    if run.mode.exact and name in _FROM_OUTPUT:
        output = call()
    else:
        with torch.no_grad():
            output = call()
        output = _attached(run, name, output, input, number in run.plan.gated)
    run.provenance.record_activation(output, Activation(name, input, number))
    return follow(run, FUNCTIONS[name], output, input)


def _attached(run: Run, name: str, output: Tensor, input: Tensor, gated: bool) -> Tensor:
    """gated: whether a product is expected to take it over, so that this history is dropped."""
    known: Kept | None = run.provenance.fine(input)
    if isinstance(known, Saved) and name == "silu" and isinstance(known.source.rebuild, Affine) and known.layouts is None:
        backward = partial(_affine_backward, affine=known.source.rebuild)
        return run.attach("silu", output, backward, known.source.tensors, input)
    if known is None and (run.mode.exact or gated):
        known = as_is(input)
    if known is not None:
        return run.attach(name, output, partial(_backward, name=name), (known,), input)
    packing = run.mode.packing(run.mode.factor)
    with torch.no_grad():
        packed = ops.pack_fake(input, *packing) if run.provenance.unread else _packed_derivative(name, input, output, packing)
    return run.attach(name, output, partial(_packed_backward, packing=packing), packed, input)


def _packed_derivative(name: str, input: Tensor, output: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    if name == "silu":
        return ops.silu_pack(input, *packing)
    if name in ("gelu", "gelu_tanh"):
        return ops.gelu_pack(input, "tanh" if name == "gelu_tanh" else "none", *packing)
    return ops.pack(derivative(name, input, output), *packing)


def derivative(name: str, input: Tensor, output: Tensor) -> Tensor:
    """The derivative of an activation, from its output: sigmoid, tanh or relu."""
    if name == "sigmoid":
        return output * (1 - output)
    return 1 - output.square() if name == "tanh" else (output > 0).to(output.dtype)


def _affine_backward(gradient: Tensor, needs: Any, *tensors: Tensor, affine: Affine) -> tuple[Tensor]:
    return (affine.silu_backward(gradient, *tensors),)


def _packed_backward(gradient: Tensor, needs: Any, codes: Tensor, scales: Tensor, *, packing: Packing) -> tuple[Tensor]:
    return (ops.scale_unpack(gradient, codes, scales, *packing),)


def _backward(gradient: Tensor, needs: Any, input: Tensor, *, name: str) -> tuple[Tensor]:
    return (GRADIENTS[name](gradient, input),)
