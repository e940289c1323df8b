"""Reading trajectories back: rows from memory-mapped shards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from agd_fast.files import read_tensors
from agd_fast.trajectories.manifest import CONDITIONS_NAME, Manifest


@dataclass(frozen=True)
class Batch:
    """States and the teacher's guided predictions: x, target [B, C, ...]; t, ω [B]; conditions, batch first."""

    sample: Tensor
    timestep: Tensor
    omega: Tensor
    conditions: dict[str, Tensor]
    target: Tensor

    def to(self, device: torch.device) -> Batch:
        conditions = {name: value.to(device, non_blocking=True) for name, value in self.conditions.items()}
        tensors = (self.sample, self.timestep, self.omega)
        sample, timestep, omega = (value.to(device, non_blocking=True) for value in tensors)
        return Batch(sample, timestep, omega, conditions, self.target.to(device, non_blocking=True))


class Trajectories:
    """All states of a folder that `collect` has finished.

    verify: compare every file with its hash.
    Raises: FileNotFoundError; ValueError naming a file that is missing, corrupted or foreign.
    """

    def __init__(self, directory: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.manifest = Manifest.read(Path(directory))
        self.manifest.check_foreign()
        for name in self.manifest.files:
            self.manifest.check_file(name, verify)
        plan = self.manifest.plan
        names = sorted(name for name in self.manifest.files if name != CONDITIONS_NAME)
        expected = -(-plan["trajectories"] // plan["shard_size"])
        if len(names) != expected:
            raise ValueError(
                f"{directory} is unfinished: expected {expected} shards, found {len(names)}; collect again to finish it"
            )
        self.conditions = read_tensors(self.manifest.directory / CONDITIONS_NAME)[0]
        self.shards = [read_tensors(self.manifest.directory / name)[0] for name in names]
        self.ends = torch.tensor([len(shard["omega"]) for shard in self.shards]).cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, rows: Tensor) -> Batch:
        """rows: [B] indices into all states."""
        shard_of = torch.bucketize(rows, self.ends, right=True)
        starts = torch.cat([self.ends.new_zeros(1), self.ends])
        first, names = self.shards[0], ("sample", "timestep", "omega", "condition", "target")
        found = {name: first[name].new_empty(len(rows), *first[name].shape[1:]) for name in names}
        for index in shard_of.unique().tolist():
            here = (shard_of == index).nonzero().squeeze(1)
            for name, values in found.items():
                values[here] = self.shards[index][name][rows[here] - starts[index]]
        conditions = {name: value[found["condition"]] for name, value in self.conditions.items()}
        return Batch(found["sample"], found["timestep"], found["omega"], conditions, found["target"])
