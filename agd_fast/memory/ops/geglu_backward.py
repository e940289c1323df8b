"""The gradient of a gated activation's input, from its packed factors."""

from __future__ import annotations

import torch
from torch import Tensor

from agd_fast.memory.ops.launching import TYPES, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, dequantise, require_float, require_packed
from agd_fast.memory.ops.registry import define


def geglu_backward_ref(
    dy: Tensor, codes_p: Tensor, scales_p: Tensor, codes_q: Tensor, scales_q: Tensor, bits: int, group: int
) -> Tensor:
    """[dy·P | dy·Q], the gradient of [a | g].

    dy: [..., D], n elements; the others as `geglu_pack` or `swiglu_pack` give them → contiguous [..., 2·D], in dy's dtype.
    Raises: ValueError naming the argument that does not fit.
    """
    _require(dy, codes_p, scales_p, codes_q, scales_q, bits, group)
    n, dtype = dy.numel(), computed_in(dy)
    P, Q = (dequantise(*one, n, bits, group, dtype).view(dy.shape) for one in ((codes_p, scales_p), (codes_q, scales_q)))
    return torch.cat((dy * P, dy * Q), dim=-1).to(dy.dtype)


def geglu_backward_fake(
    dy: Tensor, codes_p: Tensor, scales_p: Tensor, codes_q: Tensor, scales_q: Tensor, bits: int, group: int
) -> Tensor:
    _require(dy, codes_p, scales_p, codes_q, scales_q, bits, group)
    return torch.empty((*dy.shape[:-1], 2 * dy.shape[-1]), dtype=dy.dtype, device=dy.device)


def _require(dy: Tensor, codes_p: Tensor, scales_p: Tensor, codes_q: Tensor, scales_q: Tensor, bits: int, group: int) -> None:
    require_float("geglu_backward", "dy", dy)
    if not dy.ndim:
        raise ValueError("geglu_backward: dy must be [..., D], found no dimension")
    require_packed("geglu_backward", codes_p, scales_p, 1, dy.numel(), bits, group, "codes_p scales_p")
    require_packed("geglu_backward", codes_q, scales_q, 1, dy.numel(), bits, group, "codes_q scales_q")


def geglu_backward_cuda(
    dy: Tensor, codes_p: Tensor, scales_p: Tensor, codes_q: Tensor, scales_q: Tensor, bits: int, group: int
) -> Tensor:
    dx = geglu_backward_fake(dy, codes_p, scales_p, codes_q, scales_q, bits, group)
    kernels = kernels_for("geglu_backward", dy.dtype, dy.numel(), dy, codes_p, scales_p, codes_q, scales_q)
    if kernels is None:
        return NotImplemented
    inputs = [one.contiguous() for one in (dy, codes_p, scales_p, codes_q, scales_q)]
    D = dy.shape[-1]
    addresses = [one.data_ptr() for one in (*inputs, dx)]
    kernels.gated_backward(*where(dy), dy.numel() // D, D, TYPES[dy.dtype], bits, group, *addresses)
    return dx


geglu_backward = define(geglu_backward_ref, geglu_backward_fake, geglu_backward_cuda)
