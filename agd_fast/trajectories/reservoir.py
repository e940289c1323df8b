"""A few states of each trajectory, drawn while nobody knows yet how many steps it has."""

from __future__ import annotations

import torch
from torch import Tensor


class Reservoir:
    """Holds, of every trajectory, the `count` states whose keys are the lowest so far.

    keys: [b, T], different in each row, for at most T steps; random ones draw every state alike.
    """

    def __init__(self, keys: Tensor, count: int) -> None:
        self.keys, self.count = keys, count
        self._held: list[tuple[Tensor, dict[str, Tensor]]] = []  # by step: of which trajectories [b], and their values

    @property
    def step(self) -> int:
        return len(self._held)

    def add(self, values: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> None:
        """One step's values, of all trajectories [b, ...]; what stays of them lies on the CPU."""
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
        """Step by step, of trajectories in their order."""
        return {name: torch.cat([held[name] for _, held in self._held]) for name in self._held[0][1]}
