"""Making an op: a torch reference, and an opaque operator around the Triton kernel of the same signature.

The operator `agd_fast_kernels::<name>` is what stands in a graph where a kernel was chosen. It is functional; its shapes, its
gradients and its results without a GPU are the reference's. It has a FLOP formula and a number of launches, so that code that
counts operations does not take it for one that costs nothing.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from agd_fast_kernels.layouts import laid_like
from agd_fast_kernels.shapes import MAX_SCORES
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import register_flop_formula

from agd_fast.ops.choice import run
from agd_fast.ops.registry import NAMESPACE, OPS, Op

_COMPOSITES = torch.library.Library("agd_fast", "DEF")


def define(
    reference: Callable[..., Any],
    *,
    flops: Callable[..., int] | None = None,
    launches: int = 1,
    limit: Callable[..., str] = lambda *_: "",
    like: str = "",
    library: Callable[..., Any] | None = None,
) -> Op:
    """Register the operator of a reference `<name>_ref`, and keep it in OPS.

    flops: those of given arguments; None if there are no products. like: the argument whose layout the result takes, as
    `layouts.laid_like` does it; without one it is contiguous. library: the same by one call of a library, without gradients;
    raises ValueError for arguments that no library takes.
    """
    name = reference.__name__.removesuffix("_ref")
    schema = torch.library.infer_schema(reference, mutates_args=())
    signature = inspect.signature(reference)

    def implementation(*args: Any) -> Any:
        return laid(run(op, op.complete(args)), args)

    def laid(found: Any, args: tuple[Any, ...]) -> Any:
        """In the layout that the kernel gives, whatever the layouts of its other arguments."""
        its = dict(zip(signature.parameters, args, strict=False)).get(like)
        return pytree.tree_map(Tensor.contiguous, found) if its is None else laid_like(found, its)

    custom = torch.library.custom_op(f"{NAMESPACE}::{name}", implementation, mutates_args=(), schema=schema)
    custom.register_fake(lambda *args: laid(reference(*args), args))

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [leaf if isinstance(leaf, Tensor) else None for leaf in inputs]
        ctx.save_for_backward(*tensors)
        ctx.plain = [None if isinstance(leaf, Tensor) else leaf for leaf in inputs]

    def backward(ctx: Any, *grads: Any) -> Any:
        """The reference's backward. The reference runs again for it, because only the arguments are saved."""
        saved = [plain if tensor is None else tensor for tensor, plain in zip(ctx.saved_tensors, ctx.plain, strict=True)]
        wanted = [index for index, need in enumerate(ctx.needs_input_grad) if need]

        def again(*moving: Tensor) -> Any:
            given = list(saved)
            for index, tensor in zip(wanted, moving, strict=True):
                given[index] = tensor
            return reference(*given)

        pull = torch.func.vjp(again, *(saved[index] for index in wanted))[1]
        found = pull(grads[0] if len(grads) == 1 else grads)
        results: list[Any] = [None] * len(saved)
        for index, grad in zip(wanted, found, strict=True):
            results[index] = grad
        return tuple(results)

    custom.register_autograd(backward, setup_context=keep)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 0 if flops is None else flops(*op.complete(args, kwargs))

    register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name), get_raw=True)(formula)
    op = Op(name, reference, signature, overload, launches, limit, library)
    OPS[name] = op
    return op


def define_composite(reference: Callable[..., Any]) -> Callable[..., Any]:
    """An operator `agd_fast::<name>` that says in a graph what an adapter does; for all that does not know it (autograd,
    inductor, counting) it is the operations that it consists of.

    Returns the function to call, which is the reference itself where no graph is recorded.
    """
    name = reference.__name__.removesuffix("_ref")
    _COMPOSITES.define(name + torch.library.infer_schema(reference, mutates_args=()))
    _COMPOSITES.impl(name, reference, "CompositeImplicitAutograd")
    overload = getattr(torch.ops.agd_fast, name).default

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        recorded = torch.compiler.is_compiling() or get_proxy_mode() is not None
        return overload(*args, **kwargs) if recorded else reference(*args, **kwargs)

    return call


def tokens(x: Tensor) -> Tensor:
    """[B, ..., C] → [B, T, C]."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def too_many_scores(op: str, keys: Tensor) -> str:
    """Why a kernel does not take keys or values [B, S, C] of that many tokens; empty where it does."""
    most = MAX_SCORES[op]
    return "" if keys.shape[1] <= most else f"{keys.shape[1]} scores a token, more than {most}"


def row(values: Tensor, like: Tensor, channel_dim: int = -1) -> Tensor:
    """Values [B or 1, C] in the shape that broadcasts against `like`, whose channels are at `channel_dim`."""
    shape = [1] * like.ndim
    shape[0], shape[channel_dim] = values.shape
    return values.view(shape)
