"""Reading trajectories back: rows from memory-mapped shards."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agd_fast.files import fingerprint, read_tensors
from agd_fast.trajectories.manifest import Manifest

CONDITION, CONSTANT = "condition/", "constant/"  # prefixes of the names of a shard's further tensors


@dataclass(frozen=True)
class Batch:
    """States and the teacher's guided predictions: x, target [B, C, ...]; t, ω [B]; conditions, batch first.

    constants: further arguments of the denoiser's call, the same for every state.
    """

    sample: Tensor
    timestep: Tensor
    omega: Tensor
    conditions: dict[str, Tensor]
    target: Tensor
    constants: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.omega)

    def to(self, device: torch.device) -> Batch:
        conditions = {name: value.to(device, non_blocking=True) for name, value in self.conditions.items()}
        constants = {n: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for n, v in self.constants.items()}
        tensors = (self.sample, self.timestep, self.omega)
        sample, timestep, omega = (value.to(device, non_blocking=True) for value in tensors)
        return Batch(sample, timestep, omega, conditions, self.target.to(device, non_blocking=True), constants)

    def split(self, size: int) -> list[Batch]:
        """Batches of at most `size` of these states, in their order."""
        return [self._rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def _rows(self, rows: slice) -> Batch:
        conditions = {name: value[rows] for name, value in self.conditions.items()}
        sample, timestep, omega = self.sample[rows], self.timestep[rows], self.omega[rows]
        return Batch(sample, timestep, omega, conditions, self.target[rows], self.constants)


def pack(states: dict[str, Tensor], conditions: dict[str, Tensor], constants: dict[str, Any]) -> tuple[dict[str, Tensor], str]:
    """One shard as tensors by name, and constants that are not tensors as text. conditions: one row per trajectory."""
    tensors = {**states, **{CONDITION + name: value for name, value in conditions.items()}}
    tensors |= {CONSTANT + name: value for name, value in constants.items() if isinstance(value, Tensor)}
    return tensors, repr({name: value for name, value in constants.items() if not isinstance(value, Tensor)})


class _Shard:
    """The states of one file, read as they are needed."""

    def __init__(self, path: Path) -> None:
        self.tensors, metadata = read_tensors(path)
        self.conditions = {n.removeprefix(CONDITION): v for n, v in self.tensors.items() if n.startswith(CONDITION)}
        self.constants = {n.removeprefix(CONSTANT): v for n, v in self.tensors.items() if n.startswith(CONSTANT)}
        self.constants |= ast.literal_eval(metadata.get("constants", "{}"))
        shapes = {name: tuple(value.shape[1:]) for name, value in {**self.conditions, "x": self.tensors["sample"]}.items()}
        shared = fingerprint({name: value for name, value in self.constants.items() if isinstance(value, Tensor)})
        self.shape = repr((sorted(shapes.items()), metadata.get("constants"), shared))  # states of one shape make one batch

    def __len__(self) -> int:
        return len(self.tensors["omega"])

    def rows(self, rows: Tensor) -> Batch:
        sample, timestep, omega, condition, target = (
            self.tensors[name][rows] for name in ("sample", "timestep", "omega", "condition", "target")
        )
        conditions = {name: value[condition] for name, value in self.conditions.items()}
        return Batch(sample, timestep, omega, conditions, target, self.constants)


class Trajectories:
    """All states of a folder that `collect` has finished.

    verify: compare every file with its hash.
    Raises: FileNotFoundError; ValueError naming a file that is missing, corrupted or foreign.
    """

    def __init__(self, directory: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.manifest = Manifest.read(Path(directory))
        self.manifest.check_foreign()
        for name in self.manifest.files:
            try:
                self.manifest.check_file(name, verify)
            except ValueError as error:
                raise ValueError(f"{error}; collect again to make it anew") from error
        plan = self.manifest.plan
        names = sorted(self.manifest.files)
        expected = -(-plan["trajectories"] // plan["shard_size"])
        if len(names) != expected:
            raise ValueError(
                f"{directory} is unfinished: expected {expected} shards, found {len(names)}; collect again to finish it"
            )
        self._files = [_Shard(self.manifest.directory / name) for name in names]
        self.ends = torch.tensor([len(file) for file in self._files]).cumsum(0)

    @property
    def shards(self) -> list[dict[str, Tensor]]:
        """The tensors of each file."""
        return [file.tensors for file in self._files]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Tensor) -> Batch:
        """rows: [B] indices into all states. Raises: ValueError when they have several shapes; see `batches`."""
        found = self.batches(rows) or [self._files[0].rows(rows)]
        if len(found) != 1:
            raise ValueError(f"expected states of one shape, found {len(found)}; expected Trajectories.batches(rows)")
        return found[0]

    def largest(self) -> Batch:
        """One state of the shape that has the most elements."""
        first = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        return max((batch.split(1)[0] for batch in self.batches(first)), key=_elements)

    def batches(self, rows: Tensor) -> list[Batch]:
        """The states `rows` [B], in one batch per shape, each in their order: prompts may have several lengths."""
        shard_of = torch.bucketize(rows, self.ends, right=True)
        starts = torch.cat([self.ends.new_zeros(1), self.ends])
        parts: dict[str, list[tuple[Tensor, Batch]]] = {}
        for index in shard_of.unique().tolist():
            here = (shard_of == index).nonzero().squeeze(1)
            shard = self._files[index]
            parts.setdefault(shard.shape, []).append((here, shard.rows(rows[here] - starts[index])))
        return [_join(found) for found in parts.values()]


def _elements(batch: Batch) -> int:
    return batch.sample.numel() + sum(value.numel() for value in batch.conditions.values())


def _join(parts: list[tuple[Tensor, Batch]]) -> Batch:
    """One batch made of several, sorted by the places of their rows."""
    order = torch.cat([places for places, _ in parts]).argsort()
    batches = [batch for _, batch in parts]

    def joined(values: list[Tensor]) -> Tensor:
        return torch.cat(values)[order]

    sample, timestep, omega, target = (
        joined([getattr(batch, name) for batch in batches]) for name in ("sample", "timestep", "omega", "target")
    )
    conditions = {name: joined([batch.conditions[name] for batch in batches]) for name in batches[0].conditions}
    return Batch(sample, timestep, omega, conditions, target, batches[0].constants)
