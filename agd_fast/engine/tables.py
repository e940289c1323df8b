"""What depends on the step of the schedule alone, computed for all steps at once: a table with one row per step.

Row i holds every such tensor of step i, one after another. A step copies its row to one fixed place, and the forward reads
views of that place, made once. The row is found on the device, by the timestep, so the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agd_fast.memory.saved import is_dense

ALIGNMENT = 64  # bytes, of every tensor in a row: kernels may assume it


@dataclass(frozen=True)
class RowLayout:
    """Where tensors lie in rows, one row for each dtype. shapes, dtypes, strides: of the tensors; strides None: contiguous."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    strides: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> RowLayout:
        """The layout of these tensors, with their own strides where these leave no gaps."""
        dense = [tensor if is_dense(tensor) else tensor.contiguous() for tensor in tensors]
        return cls(
            tuple(tuple(tensor.shape) for tensor in tensors),
            tuple(tensor.dtype for tensor in tensors),
            tuple(tensor.stride() for tensor in dense),
        )

    @property
    def offsets(self) -> tuple[tuple[int, ...], dict[torch.dtype, int]]:
        """The first element of each tensor in the row of its dtype, and the lengths of these rows."""
        lengths = dict.fromkeys(self.dtypes, 0)
        starts = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            starts.append(lengths[dtype])
            unit = ALIGNMENT // dtype.itemsize
            lengths[dtype] += -(-torch.Size(shape).numel() // unit) * unit
        return tuple(starts), lengths

    @property
    def row_bytes(self) -> int:
        return sum(length * dtype.itemsize for dtype, length in self.offsets[1].items())

    def views(self, rows: dict[torch.dtype, Tensor]) -> list[Tensor]:
        """The tensors as views of `rows`, [length] each."""
        starts, _ = self.offsets
        found = [
            rows[dtype][start : start + torch.Size(shape).numel()].view(shape)
            for start, shape, dtype in zip(starts, self.shapes, self.dtypes, strict=True)
        ]
        if self.strides is None:
            return found
        return [view.as_strided(view.shape, strides) for view, strides in zip(found, self.strides, strict=True)]

    def packed(self, tensors: Sequence[Tensor], device: torch.device) -> dict[torch.dtype, Tensor]:
        """Copies of the tensors in new rows."""
        rows = self.empty_rows(device)
        for place, tensor in zip(self.views(rows), tensors, strict=True):
            place.copy_(tensor)
        return rows

    def empty_rows(self, device: torch.device, count: int | None = None) -> dict[torch.dtype, Tensor]:
        """One row for each dtype, [length], or `count` of them, [count, length], filled with zeros."""
        return {
            dtype: torch.zeros(length if count is None else (count, length), dtype=dtype, device=device)
            for dtype, length in self.offsets[1].items()
        }


@dataclass(frozen=True)
class Rows:
    """What the rows of a table are for. times: t [R] as the denoiser is given it. numbers: step numbers [R]. numbered: whether a
    row is found by both, rather than by t alone."""

    times: Tensor
    numbers: Tensor
    numbered: bool = False


@dataclass(frozen=True)
class Table:
    """rows: [R + 1, length] by dtype; the last row is for all steps that have no other: it is NaN (0 in integers).

    index: what `find` finds a row by.
    """

    rows: dict[torch.dtype, Tensor]
    index: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def copy_row(self, timestep: Tensor, number: Tensor | None, rows: dict[torch.dtype, Tensor]) -> None:
        """Copy the row for a timestep ([...], all of one value) and a step's number [1] to `rows`. No host sync."""
        found = find(self.index, timestep, number)
        for dtype, table in self.rows.items():
            torch.index_select(table, 0, found, out=rows[dtype][None])


def fill_rows(layout: RowLayout, columns: Sequence[Tensor]) -> dict[torch.dtype, Tensor]:
    """The rows of a table from its columns [R, …], one for each tensor of the layout."""
    count = len(columns[0])
    filled = layout.empty_rows(columns[0].device, count + 1)
    starts, _ = layout.offsets
    for column, start, dtype in zip(columns, starts, layout.dtypes, strict=True):
        filled[dtype][:count, start : start + column[0].numel()] = column.reshape(count, -1)
    for dtype, row in filled.items():
        row[count] = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    return filled


def index_of(rows: Rows, device: torch.device) -> tuple[Tensor, ...]:
    """(a, b) [R + 1], and (c, d) where rows are numbered: |a + b·t| + |c + d·number| is 0 at the row of both. At the last row
    it is almost 0, whatever t and number are: less than at any other row, except one where it is 0."""
    times = rows.times.float()
    a = torch.cat([times, torch.tensor([torch.finfo(torch.float32).tiny])])
    b = torch.cat([-torch.ones_like(times), torch.zeros(1)])
    index = (a, b, torch.cat([rows.numbers.float(), torch.zeros(1)]), b) if rows.numbered else (a, b)
    return tuple(part.to(device) for part in index)


def find(index: tuple[Tensor, ...], timestep: Tensor, number: Tensor | None = None) -> Tensor:
    """The index [1] of the row for a timestep, which all samples share, and for a step's number [1] where rows are numbered."""
    a, b, *numbered = index
    distance = torch.addcmul(a[:, None], b[:, None], timestep.reshape(1, -1).float()).abs()  # [R + 1, B]
    distance = distance.flatten() if timestep.numel() == 1 else distance.amax(dim=1)
    if numbered:
        assert number is not None
        c, d = numbered
        distance = distance + torch.addcmul(c, d, number).abs()
    return distance.argmin().reshape(1)
