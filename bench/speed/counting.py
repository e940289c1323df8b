"""FLOPs and kernel launches of PyTorch code, counted from what it dispatches: on the meta device nothing is computed.

A launch is an operation that writes a tensor: no view, no `_unsafe_view`, no allocation, no reading of metadata. Attention counts
as the one kernel that CUDA runs for it, although meta would decompose it into the products and the softmax of its definition.
Counts are of operations as they are dispatched, before a compiler fuses anything; agd_fast's kernels have FLOP formulas
and state how many launches they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from agd_fast.memory.counting import FusedAttention
from agd_fast.ops import OPS

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_LAUNCHES = {op.overload: op.launches for op in OPS.values()} | {torch.ops.agd_fast_kernels.write_merged.default: 1}
_NO_KERNEL = {
    f"aten::{name}"
    for name in (
        "_unsafe_view",
        "_reshape_alias",
        "alias",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "set_",
    )
}


@dataclass
class Counts:
    """flops: multiplications and additions of products, convolutions and attention. launches: by operation, "aten::mm" → 1."""

    flops: int = 0
    launches: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.flops + other.flops, self.launches + other.launches)

    def __mul__(self, times: int) -> Counts:
        return Counts(self.flops * times, Counter({name: count * times for name, count in self.launches.items()}))


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts, device: str) -> None:
        super().__init__()
        self.counts, self.device = counts, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        output = func(*args, **kwargs)
        if formula := flop_registry.get(func._overloadpacket):
            given = [argument for argument in args if not isinstance(argument, torch.dtype)]  # bmm's out_dtype
            self.counts.flops += formula(*given, **kwargs, out_val=output)
        written = args[0] if output is None and func in _LAUNCHES else output
        if _is_launch(func, written, self.device):
            self.counts.launches[func._schema.name] += _LAUNCHES.get(func, 1)
        return output


@contextmanager
def counting(device: str = "meta") -> Iterator[Counts]:
    """Counts the forwards that run inside; launches only on this type of device. Attention on "meta" is one kernel."""
    counts = Counts()
    with FusedAttention(), _Counting(counts, device):
        yield counts


def _is_composite(func: Any) -> bool:
    """Whether an operation is composed of others; under inference_mode such operations reach a dispatch mode undecomposed."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)


def _is_launch(func: Any, output: Any, device: str) -> bool:
    if func.is_view or func._schema.name in _NO_KERNEL:
        return False
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    return any(isinstance(one, Tensor) and one.device.type == device for one in outputs)
