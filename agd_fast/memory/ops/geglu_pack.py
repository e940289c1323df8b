"""The two factors of a gated GELU's gradient, packed."""

from __future__ import annotations

from torch import Tensor

from agd_fast.memory.ops.activations import gelu, gelu_derivative, require_approximate
from agd_fast.memory.ops.launching import ACTIVATIONS, TYPES, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, quantise, require_float, require_packing
from agd_fast.memory.ops.pack import empty_packed
from agd_fast.memory.ops.registry import define


def geglu_pack_ref(a: Tensor, g: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P = gelu(g) and Q = a·gelu′(g) of y = a·gelu(g), each as `pack` packs it; approximate: "none" or "tanh".

    a, g: [..., D], n elements each, also the strided halves of one [..., 2·D] → codes uint8 [⌈n·bits/8⌉] and scales bfloat16
    [⌈n/group⌉] of P, then of Q, in the order of contiguous [..., D]; `geglu_backward` gives the gradient.
    Raises: ValueError naming the argument that does not fit.
    """
    require_approximate("geglu_pack", approximate)
    require_gated("geglu_pack", a, g, bits, group)
    values, gates = (half.reshape(1, -1).to(computed_in(a)) for half in (a, g))
    return pack_factors(gelu(gates, approximate), values * gelu_derivative(gates, approximate), bits, group)


def geglu_pack_fake(a: Tensor, g: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_approximate("geglu_pack", approximate)
    require_gated("geglu_pack", a, g, bits, group)
    return *empty_packed(a, bits, group), *empty_packed(a, bits, group)


def pack_factors(P: Tensor, Q: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q: [1, n]."""
    (codes_p, scales_p), (codes_q, scales_q) = quantise(P, bits, group), quantise(Q, bits, group)
    return codes_p[0], scales_p[0], codes_q[0], scales_q[0]


def require_gated(op: str, a: Tensor, g: Tensor, bits: int, group: int) -> None:
    require_packing(op, bits, group)
    require_float(op, "a", a)
    if g.dtype != a.dtype or g.shape != a.shape:
        raise ValueError(f"{op}: g must be {a.dtype} {list(a.shape)} as a is, found {g.dtype} {list(g.shape)}")


def geglu_pack_cuda(a: Tensor, g: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = geglu_pack_fake(a, g, approximate, bits, group)
    return launch_gated("geglu_pack", a, g, approximate, bits, group, outputs)


def launch_gated(
    op: str, a: Tensor, g: Tensor, activation: str, bits: int, group: int, outputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = kernels_for(op, a.dtype, a.numel(), a, g)
    if kernels is None:
        return NotImplemented
    (a, a_stride), (g, g_stride) = by_rows(a), by_rows(g)
    D = a.shape[-1]
    shape = a.numel() // D, D, TYPES[a.dtype], bits, group
    addresses = [one.data_ptr() for one in outputs]
    kernels.gated_pack(*where(a), *shape, ACTIVATIONS[activation], a.data_ptr(), a_stride, g.data_ptr(), g_stride, *addresses)
    return outputs


def by_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., D], or a copy, so that its leading dimensions act as one; and the number of elements between its rows."""
    if not x.ndim:
        return x[None], 1
    sizes, strides = x.shape, x.stride()
    apart = sizes[-1] if x.ndim == 1 else strides[-2]
    regular = strides[-1] == 1 and all(strides[d] == strides[d + 1] * sizes[d + 1] for d in range(x.ndim - 2))
    return (x, apart) if regular else (x.contiguous(), sizes[-1])


geglu_pack = define(geglu_pack_ref, geglu_pack_fake, geglu_pack_cuda)
