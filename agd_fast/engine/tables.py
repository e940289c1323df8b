"""What depends on the step of the schedule alone, computed for all steps at once: a table with a row a step.

Row i holds every such tensor of step i, one after another. A step copies its row to one fixed place; what the forward reads
are views of that place, made once. The row is found on the device, by the timestep: the host never waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, of every tensor in a row: kernels may assume it


@dataclass(frozen=True)
class RowLayout:
    """Where the tensors of a step lie in its rows, one row for each dtype. shapes, dtypes: of the tensors."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

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
        """The tensors in `rows`, [length] each."""
        starts, _ = self.offsets
        return [
            rows[dtype][start : start + torch.Size(shape).numel()].view(shape)
            for start, shape, dtype in zip(starts, self.shapes, self.dtypes, strict=True)
        ]

    def empty_rows(self, device: torch.device, count: int | None = None) -> dict[torch.dtype, Tensor]:
        """One row for each dtype, [length], or `count` of them, [count, length]; 0 where nobody writes."""
        return {
            dtype: torch.zeros(length if count is None else (count, length), dtype=dtype, device=device)
            for dtype, length in self.offsets[1].items()
        }


@dataclass(frozen=True)
class Table:
    """rows: [T + 1, length] by dtype; the last row answers for all timesteps that are not in the schedule: it is NaN.

    index: weights that find a row, see `find`.
    """

    rows: dict[torch.dtype, Tensor]
    index: tuple[Tensor, Tensor]

    @property
    def bytes(self) -> int:
        return sum(rows.nbytes for rows in self.rows.values())

    def copy_row(self, timestep: Tensor, rows: dict[torch.dtype, Tensor]) -> None:
        """Write the row of a timestep, [...] with one value, to `rows`. No host sync."""
        found = find(self.index, timestep)
        for dtype, table in self.rows.items():
            torch.index_select(table, 0, found, out=rows[dtype][None])


def fill_table(layout: RowLayout, columns: Sequence[Tensor], timesteps: Tensor) -> Table:
    """The table of columns [T, …], one a tensor of the layout, for timesteps [T] on the CPU, as the denoiser is given them."""
    count, device = len(timesteps), columns[0].device
    rows = layout.empty_rows(device, count + 1)
    starts, _ = layout.offsets
    for column, start, dtype in zip(columns, starts, layout.dtypes, strict=True):
        rows[dtype][:count, start : start + column[0].numel()] = column.reshape(count, -1)
    for dtype, row in rows.items():
        row[count] = float("nan") if dtype.is_floating_point or dtype.is_complex else 0
    a, b = _index(timesteps)
    return Table(rows, (a.to(device), b.to(device)))


def _index(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) [T + 1] such that |a + b·t| is smallest at the row of t: its distance, and for the last row a quarter of the
    smallest gap between timesteps."""
    times = timesteps.float()
    gaps = times.unique().diff()
    nearest = gaps.min() / 4 if len(gaps) else times.abs().max() * 1e-3 + 1e-6
    a = torch.cat([times, nearest.reshape(1)])
    return a, torch.cat([-torch.ones_like(times), torch.zeros_like(times[:1])])


def find(index: tuple[Tensor, Tensor], timestep: Tensor) -> Tensor:
    """[1], the row of a timestep; the first of several with the same."""
    a, b = index
    return torch.addcmul(a, b, timestep.reshape(-1)[:1].float()).abs().argmin().reshape(1)
