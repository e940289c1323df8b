"""The reference code's checkpoints: {"model": {layer: {name: tensor}}}, and what its names are called here."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agd_fast.adapters.cross_attention import sinusoidal_positions
from agd_fast.reference.config import ReferenceConfig

State = dict[str, Tensor]
POSITIONS = "pos_enc.pe"  # a buffer, the same in every layer
POSITIONS_LENGTH = 250

# from a module's name there to its name here, with {i} for the layer
_EMBEDDER = "embedders.{i}."
_OMEGA = "guidance_scale_embedder.net."
_MODULES = {
    "attention": {
        _OMEGA + "1.net.0": _EMBEDDER + "omega.net.0",
        _OMEGA + "1.net.2": _EMBEDDER + "omega.net.2",
        _OMEGA + "2": _EMBEDDER + "omega.net.3",
        "out_proj": "sites.{i}.out",
    },
    "additive": {  # whose MLPs have dropout and one more LayerNorm
        _OMEGA + "1.net.0": _EMBEDDER + "omega.net.0",
        _OMEGA + "1.net.3": _EMBEDDER + "omega.net.2",
        _OMEGA + "1.net.4": _EMBEDDER + "omega.net.3",
        _OMEGA + "2": _EMBEDDER + "omega.net.4",
        "out_proj.net.0": "sites.{i}.net.0",
        "out_proj.net.3": "sites.{i}.net.2",
        "out_proj.net.4": "sites.{i}.net.3",
    },
}
_QKV = {"q_proj.weight": "query", "k_proj.weight": "key", "v_proj.weight": "value"}


def tensor_names(config: ReferenceConfig) -> dict[str, str]:
    """From the name of each tensor of a layer there, except its positions, to its name in our part, with {i} for the layer."""
    names = {f"{_OMEGA}0.{name}": f"{_EMBEDDER}omega.features.{name}" for name in ("frequencies", "phases")}
    modules = dict(_MODULES[config.arch])
    if config.use_timestep:
        modules["timestep_proj"] = _EMBEDDER + "time"
    if config.use_condition:
        modules[f"{config.condition}_proj"] = _EMBEDDER + "conditions.0"
    if config.arch == "attention":
        names |= {there: f"sites.{{i}}.{here}.weight" for there, here in _QKV.items()}
    return names | {f"{there}.{kind}": f"{here}.{kind}" for there, here in modules.items() for kind in ("weight", "bias")}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, State]:
    """The tensors of each layer, on the CPU. The file is a pickle: nothing but tensors is ever loaded from it.

    Raises: FileNotFoundError, PermissionError; ValueError when it holds anything else, or is truncated.
    """
    expected = "expected a checkpoint of the reference code, {'model': {layer: {name: tensor}}}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{expected} at {path}, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:  # by where it breaks
        raise ValueError(f"{path} cannot be read as tensors alone; {expected}, found: {error}") from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise ValueError(f"{expected} in {path}, found {_described(content)}")
    for layer, state in content["model"].items():
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{expected} in {path}, found under {layer!r} {_described(state)}")
    return {layer: dict(state) for layer, state in content["model"].items()}


def _described(value: Any) -> str:
    return f"entries {sorted(map(str, value))[:5]}" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def renamed(layers: Mapping[str, State], config: ReferenceConfig, shapes: Mapping[str, tuple[int, ...]]) -> State:
    """The state of our part from that of the reference's layers, in order, in float32.

    shapes: of every tensor of the part. Raises: ValueError naming the first tensor that is missing, foreign or of another shape.
    """
    names = tensor_names(config)
    state: State = {}
    for index, (layer, tensors) in enumerate(layers.items()):
        expected = {there: shapes[here.format(i=index)] for there, here in names.items()}
        if config.arch == "attention":
            expected[POSITIONS] = (POSITIONS_LENGTH, config.hidden_dim)
        missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        if missing or foreign:
            raise ValueError(
                f"{layer} does not hold what its config says (arch={config.arch!r}, use_timestep={config.use_timestep}, "
                f"the {config.condition} used: {config.use_condition}): missing {missing or 'none'}, unknown {foreign or 'none'}"
            )
        for name, shape in expected.items():
            if tensors[name].shape != shape:
                raise ValueError(
                    f"width mismatch at {layer}.{name}: the config (hidden_dim={config.hidden_dim}) and the base ask for "
                    f"{list(shape)}, the checkpoint has {list(tensors[name].shape)}"
                )
        if config.arch == "attention":
            _check_positions(layer, tensors[POSITIONS])
        state |= {here.format(i=index): tensors[there].to(torch.float32, copy=True) for there, here in names.items()}
    return state


def _check_positions(layer: str, found: Tensor) -> None:
    expected = sinusoidal_positions(torch.arange(found.shape[0]), found.shape[1])
    difference = (found.float() - expected).abs().max()
    if not difference < 1e-4:
        raise ValueError(
            f"expected sines and cosines of the position in {layer}.{POSITIONS}, found others: they differ by {difference:.2g}"
        )
