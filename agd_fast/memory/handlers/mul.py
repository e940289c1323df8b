"""Products: of an activation function and what it gates, of activations and rows that scale them, of two activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory import ops
from agd_fast.memory.handlers.activations import FUNCTIONS, GRADIENTS, derivative
from agd_fast.memory.handlers.follow import follow
from agd_fast.memory.interception import Run
from agd_fast.memory.modes import Packing
from agd_fast.memory.provenance import Activation, channel_factors
from agd_fast.memory.saved import Kept, as_is


def mul(run: Run, call: Callable[[], Tensor], input: Tensor, other: Any) -> Tensor:
    """input, other: broadcast to each other."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor):
        return call()
    if not run.replaces_product(input, other):
        return follow(run, torch.mul, call(), input, other)
    if input.shape == other.shape and input is not other:
        for value, gate in ((input, other), (other, input)):
            activation = run.provenance.activation_of(gate)
            if activation is not None and activation.input.dtype == value.dtype == gate.dtype:
                return _gated(run, call, value, gate, activation)
    with torch.no_grad():
        output = call()
    saved = tuple(factor(run, one, output) for one in (input, other))
    return follow(run, torch.mul, run.attach("mul", output, _backward, saved, input, other), input, other)


def factor(run: Run, one: Tensor, output: Tensor) -> Kept:
    """What a product keeps of one of its factors; a row that scales the others is kept as it is.

    Of a feed-forward's output it keeps a copy: to rebuild that would take as many matrix products as its backward.
    """
    if one.numel() < output.numel():
        return as_is(one)
    return run.provenance.save(one, run.mode.fine, heaviest=1)


def product_gradient(gradient: Tensor, by: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (gradient * by).sum_to_size(shape)


def _backward(gradient: Tensor, needs: Any, input: Tensor, other: Tensor) -> tuple[Tensor | None, ...]:
    return (
        product_gradient(gradient, other, input.shape) if needs[0] else None,
        product_gradient(gradient, input, other.shape) if needs[1] else None,
    )


def _gated(run: Run, call: Callable[[], Tensor], value: Tensor, gate: Tensor, activation: Activation) -> Tensor:
    """value ⊙ act(g), as one function of value and g: what the activation kept for itself is freed with its output."""
    with torch.no_grad():
        output = call()
    run.plan.found_gated.add(activation.number)
    inputs = value, activation.input
    known = [run.provenance.fine(one) for one in inputs]
    if run.mode.exact or None not in known:
        saved = tuple(as_is(given) if one is None else one for one, given in zip(known, inputs, strict=True))
        return run.attach("gated", output, partial(_gated_backward, name=activation.name), saved, *inputs)
    packing = run.mode.packing(run.mode.factor)
    with torch.no_grad():
        unread = run.provenance.unread
        even = channel_factors(value, (-1,), unread)
        packed: tuple[Tensor, ...] = (
            (*ops.pack_fake(gate, *packing), *ops.pack_fake(value, *packing))
            if unread
            else _packed_factors(activation.name, value / even, activation.input, gate, packing)
        )
    return run.attach("gated", output, partial(_packed_backward, packing=packing), (even, *packed), *inputs)


def _packed_factors(name: str, value: Tensor, input: Tensor, gate: Tensor, packing: Packing) -> tuple[Tensor, ...]:
    if name == "silu":
        return ops.swiglu_pack(value, input, *packing)
    if name in ("gelu", "gelu_tanh"):
        return ops.geglu_pack(value, input, "tanh" if name == "gelu_tanh" else "none", *packing)
    return *ops.pack(gate, *packing), *ops.pack(value * derivative(name, input, gate), *packing)


def _gated_backward(gradient: Tensor, needs: Any, value: Tensor, input: Tensor, *, name: str) -> tuple[Tensor | None, ...]:
    return (
        gradient * FUNCTIONS[name](input) if needs[0] else None,
        GRADIENTS[name](gradient * value, input) if needs[1] else None,
    )


def _packed_backward(gradient: Tensor, needs: Any, even: Tensor, *packed: Tensor, packing: Packing) -> tuple[Tensor | None, ...]:
    by_value, by_input = ops.geglu_backward(gradient, *packed, *packing).chunk(2, dim=-1)
    return by_value, by_input.mul_(even)
