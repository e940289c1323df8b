"""The two factors of a gated SiLU's gradient, packed."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.ops.activations import silu_derivative
from agd_fast.memory.ops.geglu_pack import launch_gated, pack_factors, require_gated
from agd_fast.memory.ops.layout import computed_in
from agd_fast.memory.ops.pack import empty_packed
from agd_fast.memory.ops.registry import define


def swiglu_pack_ref(a: Tensor, g: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P = silu(g) and Q = a·silu′(g) of y = a·silu(g), each as `pack` packs it.

    a, g, the result, errors: as in `geglu_pack`; `geglu_backward` gives the gradient.
    """
    require_gated("swiglu_pack", a, g, bits, group)
    values, gates = (half.reshape(1, -1).to(computed_in(a)) for half in (a, g))
    return pack_factors(F.silu(gates), values * silu_derivative(gates), bits, group)


def swiglu_pack_fake(a: Tensor, g: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_gated("swiglu_pack", a, g, bits, group)
    return *empty_packed(a, bits, group), *empty_packed(a, bits, group)


def swiglu_pack_cuda(a: Tensor, g: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return launch_gated("swiglu_pack", a, g, "silu", bits, group, swiglu_pack_fake(a, g, bits, group))


swiglu_pack = define(swiglu_pack_ref, swiglu_pack_fake, swiglu_pack_cuda)
