"""SiLU's derivative, packed."""

from __future__ import annotations

from torch import Tensor

from agd_fast.memory.ops.activations import silu_derivative
from agd_fast.memory.ops.launching import ACTIVATIONS, TYPES, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, quantise, require_float, require_packing
from agd_fast.memory.ops.pack import empty_packed
from agd_fast.memory.ops.registry import define


def silu_pack_ref(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """silu′(x) as `pack` packs it.

    x: n elements, any shape → codes uint8 [⌈n·bits/8⌉], scales bfloat16 [⌈n/group⌉]; `scale_unpack` gives the gradient.
    Raises: ValueError naming the argument that does not fit.
    """
    _require(x, bits, group)
    codes, scales = quantise(silu_derivative(x.reshape(1, -1).to(computed_in(x))), bits, group)
    return codes[0], scales[0]


def silu_pack_fake(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    _require(x, bits, group)
    return empty_packed(x, bits, group)


def _require(x: Tensor, bits: int, group: int) -> None:
    require_packing("silu_pack", bits, group)
    require_float("silu_pack", "x", x)


def silu_pack_cuda(x: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes, scales = silu_pack_fake(x, bits, group)
    kernels = kernels_for("silu_pack", x.dtype, x.numel(), x)
    if kernels is None:
        return NotImplemented
    x = x.contiguous()
    addresses = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
    kernels.derivative_pack(*where(x), x.numel(), TYPES[x.dtype], bits, group, ACTIVATIONS["silu"], *addresses)
    return codes, scales


silu_pack = define(silu_pack_ref, silu_pack_fake, silu_pack_cuda)
