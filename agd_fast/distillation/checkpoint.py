"""Training state on disk, whole or not at all: one safetensors file that a run continues from bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from agd_fast.files import differences, read_tensors, write_tensors

CHECKPOINT_NAME = "checkpoint.safetensors"


def save_checkpoint(
    path: Path, step: int, run: dict[str, Any], modules: dict[str, nn.Module], optimizer: Optimizer, others: dict[str, Any]
) -> None:
    """Save weights of `modules`, optimizer, random generators, position, and `others`, whose state is plain JSON."""
    tensors: dict[str, Tensor] = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for name, module in modules.items():
        tensors |= {f"{name}/{key}": value for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": value for key, value in state.items()}
    metadata = {"step": str(step), "run": json.dumps(run, sort_keys=True)}
    metadata |= {name: json.dumps(other.state_dict()) for name, other in others.items()}
    write_tensors(path, tensors, metadata, sealed=True)


def load_checkpoint(
    path: Path, run: dict[str, Any], modules: dict[str, nn.Module], optimizer: Optimizer, others: dict[str, Any]
) -> int:
    """Restore what `save_checkpoint` wrote; returns the number of steps done.

    Raises: ValueError when the file is damaged or belongs to a run with other settings (named).
    """
    try:
        tensors, metadata = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{error}; remove it, or give resume=False, to start anew") from error
    if "run" in metadata and (missing := [name for name in others if name not in metadata]):
        raise ValueError(
            f"{path} is of another version: expected the state of {', '.join(missing)} too; resume=False starts anew"
        )
    if differing := differences(json.loads(json.dumps(run)), json.loads(metadata.get("run", "{}"))):
        raise ValueError(
            f"{path} belongs to a run with other settings ({differing}); give another output_dir, or resume=False to start anew"
        )
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({key.removeprefix(prefix): v.clone() for key, v in tensors.items() if key.startswith(prefix)})
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/")
            states.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    for name, other in others.items():
        other.load_state_dict(json.loads(metadata[name]))
    # the schedule set this run's rate when it was made; put the resumed step's in its place
    for group, rate in zip(optimizer.param_groups, others["schedule"].get_last_lr(), strict=True):
        group["lr"] = rate
    torch.set_rng_state(tensors["rng.cpu"].clone())
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"].clone())
    return int(metadata["step"])
