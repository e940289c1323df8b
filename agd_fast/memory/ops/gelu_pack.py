"""GELU's derivative, packed."""

from __future__ import annotations

from torch import Tensor

from agd_fast.memory.ops.activations import gelu_derivative, require_approximate
from agd_fast.memory.ops.launching import ACTIVATIONS, TYPES, kernels_for, where
from agd_fast.memory.ops.layout import computed_in, quantise, require_float, require_packing
from agd_fast.memory.ops.pack import empty_packed
from agd_fast.memory.ops.registry import define


def gelu_pack_ref(x: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """gelu′(x) as `pack` packs it; approximate: "none" or "tanh", as in `F.gelu`.

    x: n elements, any shape → codes uint8 [⌈n·bits/8⌉], scales bfloat16 [⌈n/group⌉]; `scale_unpack` gives the gradient.
    Raises: ValueError naming the argument that does not fit.
    """
    _require(x, approximate, bits, group)
    derivative = gelu_derivative(x.reshape(1, -1).to(computed_in(x)), approximate)
    codes, scales = quantise(derivative, bits, group)
    return codes[0], scales[0]


def gelu_pack_fake(x: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor]:
    _require(x, approximate, bits, group)
    return empty_packed(x, bits, group)


def _require(x: Tensor, approximate: str, bits: int, group: int) -> None:
    require_approximate("gelu_pack", approximate)
    require_packing("gelu_pack", bits, group)
    require_float("gelu_pack", "x", x)


def gelu_pack_cuda(x: Tensor, approximate: str, bits: int, group: int) -> tuple[Tensor, Tensor]:
    codes, scales = gelu_pack_fake(x, approximate, bits, group)
    kernels = kernels_for("gelu_pack", x.dtype, x.numel(), x)
    if kernels is None:
        return NotImplemented
    x = x.contiguous()
    addresses = x.data_ptr(), codes.data_ptr(), scales.data_ptr()
    kernels.derivative_pack(*where(x), x.numel(), TYPES[x.dtype], bits, group, ACTIVATIONS[approximate], *addresses)
    return codes, scales


gelu_pack = define(gelu_pack_ref, gelu_pack_fake, gelu_pack_cuda)
