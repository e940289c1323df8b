"""Weights with their low-rank terms, all those of a step written at once to where the step reads them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from agd_fast.ops.choice import Kernels, missing, or_reference
from agd_fast.ops.exactness import off
from agd_fast.ops.registry import NAMESPACE

_CHECKED: set[torch.dtype] = set()  # dtypes whose kernel was checked in this process


def write_merged_ref(outs: Sequence[Tensor], bases: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]) -> None:
    """outs[i] ← bases[i] + ups[i]·downs[i].

    outs, bases: [C, K], of any strides; ups: [C, r]; downs: [r, K].
    """
    for out, base, up, down in zip(outs, bases, ups, downs, strict=True):
        torch.addmm(out.copy_(base), up, down, out=out)


class WriteMerged:
    """`write_merged_ref`, as one launch where kernels may run: not worth measuring against torch's two launches per weight.
    The first launch for a dtype is checked.

    It keeps the tables of the last launch, because a CUDA graph of that launch reads them again.
    """

    def __init__(self, policy: Kernels) -> None:
        self.policy = policy
        self._tables: Sequence[Tensor] = ()
        self._key: Any = None  # of the tensors that they describe

    def __call__(self, outs: Sequence[Tensor], bases: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]) -> None:
        if outs and (self.policy == "always" or (self.policy == "auto" and outs[0].is_cuda)):
            if outs[0].is_cuda and not missing():
                self._look_at(outs, bases, ups, downs)
            torch.ops.agd_fast_kernels.write_merged(outs, bases, ups, downs, self._tables)
        else:
            write_merged_ref(outs, bases, ups, downs)

    def _look_at(self, *every: Sequence[Tensor]) -> None:
        """Make the tables at the first of equal steps: nothing can be copied from the host while a CUDA graph is recorded."""
        key = [[(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in each] for each in every]
        if key != self._key:
            try:
                self._tables = _kernel().tables_of(*every)
            except ValueError:  # no kernel takes these
                self._tables = ()
            self._key = key


@torch.library.custom_op(f"{NAMESPACE}::write_merged", mutates_args=("outs",))
def _write_merged(
    outs: Sequence[Tensor], bases: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor], tables: Sequence[Tensor]
) -> None:
    """Run it on its kernel where there are tables for that, else by the reference."""
    if not tables:
        return write_merged_ref(outs, bases, ups, downs)

    def launch() -> None:
        _kernel().write_merged_fwd(outs, bases, ups, downs, tables)
        if (kind := outs[0].dtype) not in _CHECKED and not torch.cuda.is_current_stream_capturing():
            require_exact(outs, bases, ups, downs)
            _CHECKED.add(kind)

    return or_reference("write_merged", launch, lambda: write_merged_ref(outs, bases, ups, downs), outs[0])


def require_exact(outs: Sequence[Tensor], bases: Sequence[Tensor], ups: Sequence[Tensor], downs: Sequence[Tensor]) -> None:
    """Raises: RuntimeError where what a kernel wrote is off the reference."""
    for out, *parts in zip(outs, bases, ups, downs, strict=True):
        exact = [one.double() for one in parts]
        if reason := off([out], [torch.addmm(*parts)], [torch.addmm(*exact)]):
            raise RuntimeError(f"it is off the reference, {reason}")


@register_flop_formula(torch.ops.agd_fast_kernels.write_merged, get_raw=True)
def _flops(outs: Sequence[Tensor], bases: Sequence[Tensor], ups: Sequence[Tensor], *_: object, **__: object) -> int:
    return sum(2 * out.numel() * up.shape[1] for out, up in zip(outs, ups, strict=True))


def _kernel() -> Any:
    return importlib.import_module(f"{NAMESPACE}.write_merged")
