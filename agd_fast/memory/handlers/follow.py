"""Element-wise functions and joins keep nothing; if their inputs can be rebuilt, so can their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.interception import Run
from agd_fast.memory.provenance import DEEPEST, again
from agd_fast.memory.saved import Saved


def elementwise(run: Run, call: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    """inputs: broadcast to each other."""
    output = call()
    if options or not all(isinstance(one, Tensor) for one in inputs):
        return output
    return follow(run, call.func, output, *inputs)  # type: ignore[attr-defined]


def joined(run: Run, call: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int = 0, **options: Any) -> Tensor:
    """torch.cat or torch.stack."""
    output = call()
    if not options and _worth(run, output) and all(isinstance(one, Tensor) for one in tensors):
        found = [run.provenance.find(one) for one in tensors]
        parents = [one for one in found if one is not None and one.source.depth < DEEPEST]
        if len(parents) == len(found):
            function = partial(_join, function=call.func, dim=dim)  # type: ignore[attr-defined]
            run.provenance.record(output, again(function, *parents))
    return output


def follow(run: Run, function: Callable[..., Tensor], output: Tensor, *inputs: Tensor) -> Tensor:
    """Record that `output` = function(*inputs), element by element; inputs that are broadcast are kept. Returns `output`."""
    if not _worth(run, output):
        return output
    known: dict[int, Saved] = {}
    for one in inputs:
        if one.numel() == output.numel() and id(one) not in known:
            found = run.provenance.find(one)
            if found is None or found.source.depth >= DEEPEST:
                return output
            known[id(one)] = found
    roots = [one.source.roots for one in known.values()]
    if known and frozenset[int]().union(*roots) in roots:  # else sums of residuals would be followed through all blocks
        rows = tuple(one for one in inputs if id(one) not in known)
        if any(row.is_inference() for row in rows):  # which autograd refuses to keep
            return output
        order = [*known]
        places = tuple(order.index(id(one)) if id(one) in known else None for one in inputs)
        run.provenance.record(output, again(partial(_repeat, function=function, places=places), *known.values(), tensors=rows))
    return output


def _worth(run: Run, output: Tensor) -> bool:
    return output.requires_grad and output.numel() >= run.mode.smallest


def _repeat(*tensors: Tensor, function: Callable[..., Tensor], places: tuple[int | None, ...]) -> Tensor:
    """tensors: rows, then values; places: which value each argument is, None for the next row."""
    count = places.count(None)
    rows, values = iter(tensors[:count]), tensors[count:]
    with torch.no_grad():
        return function(*(next(rows) if place is None else values[place] for place in places))


def _join(*values: Tensor, function: Callable[..., Tensor], dim: int) -> Tensor:
    with torch.no_grad():
        return function(values, dim=dim)
