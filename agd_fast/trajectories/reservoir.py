"""A few states of each trajectory, drawn while its number of steps is not known yet."""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """Holds, of every trajectory, the `count` states whose keys are the lowest so far.

    keys: [b, T], for at most T steps, without duplicates in a row; random keys draw every state with equal probability.
    """

    def __init__(self, keys: Tensor, count: int) -> None:
        self.keys, self.count = keys, count
        self._held: list[tuple[Tensor, dict[str, Tensor]]] = []  # by step: mask of the trajectories [b], and their values

    @property
    def step(self) -> int:
        return len(self._held)

    def add(self, values: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
        """Add one step's values, of all trajectories [b, ...]; those that are held are copied to the CPU."""
        seen = self.keys[:, : self.step + 1]
        chosen = seen.argsort(dim=1).argsort(dim=1) < self.count  # [b, step + 1]
        for step, (rows, held) in enumerate(self._held):
            stays = chosen[rows, step]
            if not stays.all():
                self._held[step] = (chosen[:, step], {name: value[stays] for name, value in held.items()})
        rows = chosen[:, -1]
        kept = {name: value[rows.to(value.device)].to("cpu", dtypes.get(name), copy=True) for name, value in values.items()}
        self._held.append((rows, kept))

    def tensors(self) -> dict[str, Tensor]:
        """The values held, step by step, each with its trajectories in order."""
        return {name: torch.cat([held[name] for _, held in self._held]) for name in self._held[0][1]}
