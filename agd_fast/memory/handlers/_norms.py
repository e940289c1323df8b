"""What layer, RMS and group norms share: rows that are normalised, each by its own statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agd_fast.memory import ops
from agd_fast.memory.interception import Backward, Run, autocasts
from agd_fast.memory.modes import Packing
from agd_fast.memory.provenance import again
from agd_fast.memory.saved import Kept, Source, new_root, read


class Rows(NamedTuple):
    """How an input is cut into rows of n elements in memory order. a_sample: rows per sample.

    Element i of row r belongs to channel (r mod groups)·(n/space) + ⌊i/space⌋.
    """

    a_sample: int
    groups: int = 1
    space: int = 1


@dataclass(frozen=True)
class Affine:
    """A norm's output x̂·γ + β from packed x̂: (codes, scales[, γ][, β]) → a tensor of `size`."""

    size: tuple[int, ...]
    rows: Rows
    packing: Packing
    dtype: torch.dtype
    scaled: bool
    shifted: bool

    def __call__(self, codes: Tensor, scales: Tensor, *affine: Tensor) -> Tensor:
        return ops.affine_unpack(codes, scales, *self._affine(affine), self.size, *self.rows, *self.packing, self.dtype)

    def silu_backward(self, gradient: Tensor, codes: Tensor, scales: Tensor, *affine: Tensor) -> Tensor:
        return ops.silu_affine_backward(gradient, codes, scales, *self._affine(affine), *self.rows, *self.packing)

    def _affine(self, given: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        found = [one.to(wide).reshape(1, -1) for one in given]
        gamma = found.pop(0) if self.scaled else None
        return gamma, found.pop(0) if self.shifted else None


def normalised(
    run: Run,
    name: str,
    call: Callable[[], Tensor],
    norm: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    length: int,
    eps: float,
    *,
    input_gradient: Callable[..., Tensor] | None = None,
    centred: bool = True,
    fine: bool = False,
) -> Tensor:
    """The norm's output; for backward x̂ is kept, or the input itself in exact modes and where matrix products give it back.

    norm: the function itself, of (input, weight, bias). input_gradient: its gradient, of (gradient, input, weight, bias), if that
    takes less than autograd's. length: n. fine: whether x̂ is wanted in the fine form in any case.
    """
    number = run.next_norm()
    with torch.no_grad():
        output = call()
    affine = tuple(one for one in (weight, bias) if one is not None)
    found = run.provenance.fine(input)
    given: Kept | None = run.provenance.save(input, None) if found is None and run.mode.exact else found
    if given is not None and (run.mode.exact or (found is not None and found.source.cost)):
        saved = (given, *affine)
        cast = output.dtype if autocasts(input) else None
        rerun = partial(_rerun, norm=norm, dtype=cast, scaled=weight is not None)
        backward: Backward = partial(_rerun_backward, rerun=rerun)
        if input_gradient is not None:
            backward = partial(_own_backward, input_gradient=input_gradient, dtype=cast, scaled=weight is not None)
        output = run.attach(name, output, backward, saved, input)
        run.provenance.record(output, again(partial(_without_grad, rerun=rerun), *saved))
        return output
    bits = run.mode.fine if fine or length < run.mode.narrow or run.plan.wants_fine(number) else run.mode.norm
    packing = run.mode.packing(bits)
    if run.provenance.unread:
        rstd = input.new_empty(input.numel() // length, dtype=torch.promote_types(input.dtype, torch.float32))
        packed = ops.norm_pack_fake(input, None, rstd, *packing)
    else:
        with torch.no_grad():
            mean, rstd = _statistics(input, length, eps, centred)
            packed = ops.norm_pack(input.contiguous(), mean, rstd, *packing)
    backward = partial(_backward, rows=rows, centred=centred, packing=packing)
    kept = (*packed, rstd) if weight is None else (*packed, rstd, weight)
    output = run.attach(name, output, backward, kept, input)
    rebuild = Affine(tuple(output.shape), rows, packing, output.dtype, weight is not None, bias is not None)
    fine = packing.bits >= 8
    source = Source((*packed, *affine), rebuild, fine=fine, roots=new_root(), norms=frozenset({number}), reads=read(affine))
    run.provenance.record(output, source)
    return output


def _statistics(input: Tensor, length: int, eps: float, centred: bool) -> tuple[Tensor | None, Tensor]:
    rows, wide = input.reshape(-1, length), torch.promote_types(input.dtype, torch.float32)
    if not centred:
        return None, (torch.linalg.vector_norm(rows, dim=1, dtype=wide).square() / length + eps).rsqrt()
    variance, mean = torch.var_mean(rows.to(wide), 1, correction=0)
    return mean, (variance + eps).rsqrt()


def _backward(
    gradient: Tensor,
    needs: Any,
    codes: Tensor,
    scales: Tensor,
    rstd: Tensor,
    weight: Tensor | None = None,
    *,
    rows: Rows,
    centred: bool,
    packing: Packing,
) -> tuple[Tensor]:
    gamma = None if weight is None else weight.reshape(-1)
    return (ops.norm_backward(gradient, codes, scales, rstd, gamma, centred, rows.groups, rows.space, *packing),)


def _rerun(*given: Tensor, norm: Callable[..., Tensor], dtype: torch.dtype | None, scaled: bool) -> Tensor:
    return norm(*_cast(given, dtype, scaled))


def _cast(given: tuple[Tensor, ...], dtype: torch.dtype | None, scaled: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """given: an input[, γ][, β] → all three, in that dtype."""
    input, *affine = given if dtype is None else [one.to(dtype) for one in given]
    weight = affine.pop(0) if scaled else None
    return input, weight, affine.pop(0) if affine else None


def _own_backward(
    gradient: Tensor, needs: Any, *given: Tensor, input_gradient: Callable[..., Tensor], dtype: torch.dtype | None, scaled: bool
) -> tuple[Tensor]:
    return (input_gradient(gradient, *_cast(given, dtype, scaled)).to(given[0].dtype),)


def _without_grad(*values: Tensor, rerun: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return rerun(*values)


def _rerun_backward(
    gradient: Tensor, needs: Any, input: Tensor, *affine: Tensor, rerun: Callable[..., Tensor]
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        input = input.detach().requires_grad_()
        output = rerun(input, *affine)
    return torch.autograd.grad(output, (input,), gradient)
