"""Adapters on disk: `adapter.safetensors` and `adapter_config.json` in one folder, never a pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from agd_fast.adapters import Adapter, AdapterConfig
from agd_fast.adapters.calibration import Calibration
from agd_fast.attaching import (
    Model,
    components_of,
    denoiser_of,
    install,
    layout_for,
    require_attachment,
    require_known_call,
    spec_of,
    wrap,
)
from agd_fast.checking import is_finite
from agd_fast.files import read_json, read_tensors, replacing, save_tensors, to_json
from agd_fast.schedule import prediction_type_of
from agd_fast.sites import Layout
from agd_fast.sources import CONFIG_NAME, WEIGHTS_NAME, resolve
from agd_fast.spec import DenoiserSpec
from agd_fast.version import __version__

FORMAT_VERSION = 1


def save(model: Any, directory: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None) -> Path:
    """Write the attached adapter to `directory` and return `directory`.

    The adapters of a pipeline's further denoisers go to folders in it.
    about: further entries for the config, for a reader (the teacher, how it was trained).
    Raises: ValueError if no adapter is attached; OSError if the directory cannot be written.
    """
    directory = Path(directory)
    components = components_of(model, require_attachment(model).spec)
    for folder, component in zip(component_folders(directory, components), components.values(), strict=True):
        _save_one(model, component, folder, about or {})
    return directory


def component_folders(directory: Path, components: Mapping[str, Any]) -> list[Path]:
    """Where the adapters of these denoisers are: the first in `directory`, the others in folders in it with their names."""
    return [directory if index == 0 else directory / name for index, name in enumerate(components)]


def _save_one(model: Any, component: nn.Module, directory: Path, about: Mapping[str, Any]) -> None:
    attachment, denoiser = require_attachment(component), denoiser_of(component)
    calibration = attachment.adapter.calibration
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "base_class": _base_class(denoiser),
        "guidance_convention": "omega = guidance_scale + omega_offset; omega = 1 is no guidance",
        "omega_offset": attachment.spec.omega_offset,
        "prediction_type": _prediction_type(model),
        "adapter": attachment.adapter.config.to_dict(),
        "layout": attachment.adapter.layout.to_dict(),
        "calibration": None if calibration is None else calibration.to_dict(),
        "about": {"base_model": _base_model(model, denoiser), **about},
    }
    config = json.loads(json.dumps(config))  # exactly what a reader will find
    metadata = {"config_id": _config_id(config)}
    with replacing(directory / WEIGHTS_NAME) as weights, replacing(directory / CONFIG_NAME) as text:  # both or neither
        save_tensors(weights, attachment.adapter.state_dict(), metadata, sealed=True)
        text.write_text(to_json(config), encoding="utf-8")


def _base_class(denoiser: nn.Module) -> str:
    """The name of its class, without the prefix that FSDP2 adds."""
    names = [cls.__name__ for cls in type(denoiser).__mro__]
    plain = names[0].removeprefix("FSDP")
    return plain if plain in names else names[0]


def _base_model(model: Any, denoiser: nn.Module) -> str | None:
    """The base's name, for a reader; of a folder on this machine only the last part, which is not a repo id."""
    name = getattr(model, "name", None) or getattr(model, "name_or_path", None) or getattr(denoiser, "name_or_path", None)
    return Path(name).name if name and (os.path.isabs(name) or os.path.isdir(name)) else name


def load(
    model: Model,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    spec: DenoiserSpec | None = None,
) -> Model:
    """Attach the adapter in `source`. Modifies `model` and returns it.

    The adapter does nothing until it is armed: by a pipeline's own call, by `guided` or by the guider.
    source: a folder that `save` or `distill` wrote, or, if there is no such folder, the id of a Hub repo ("name/repo").
    revision, token: of that repo; see `agd_fast.sources.resolve`.
    Raises: FileNotFoundError if a file or the repo is missing; ValueError if a file is truncated, from a newer format, or made
    for another base (naming what was expected and what was found), or if a pipeline cannot have an adapter (as in `attach`). The
    model is then as it was.
    """
    directory = resolve(source, revision=revision, token=token)
    spec = spec_of(model, spec)
    require_known_call(model, spec)
    components = components_of(model, spec)
    read = []
    for folder, component in zip(component_folders(directory, components), components.values(), strict=True):
        read.append((denoiser_of(component), _read_for(model, denoiser_of(component), folder, spec)))
    for denoiser, adapter in read:
        install(denoiser, adapter, spec)
    return wrap(model)


def _read_for(model: Any, denoiser: nn.Module, directory: Path, spec: DenoiserSpec) -> Adapter:
    """The adapter of a directory. Raises: as `load`, when it is not one for this denoiser."""
    config = read_config(directory)
    bases = [cls.__name__ for cls in type(denoiser).__mro__]
    if config["base_class"] not in bases:
        raise ValueError(
            f"{directory} holds an adapter for a {config['base_class']}, expected one for this {type(denoiser).__name__}"
        )
    for name, expected in (("prediction_type", _prediction_type(model)), ("omega_offset", spec.omega_offset)):
        if None not in (expected, config[name]) and config[name] != expected:
            raise ValueError(f"{directory} holds an adapter for {name}={config[name]!r}, expected {expected!r} for this model")
    adapter_config, layout = AdapterConfig.from_dict(config["adapter"]), Layout.from_dict(config["layout"])
    _same_layout(directory, layout, layout_for(denoiser, adapter_config, spec))
    return read_adapter(directory, config)


def read_config(directory: Path) -> dict[str, Any]:
    """The checked `adapter_config.json` of a directory."""
    path = directory / CONFIG_NAME
    if not path.is_file():
        found = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else "no such directory"
        raise FileNotFoundError(f"expected {CONFIG_NAME} and {WEIGHTS_NAME} in {directory}, found {found}")
    config = read_json(path)
    version = config.get("format_version") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not an adapter of agd_fast: expected a format_version, found {version!r}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this agd_fast {__version__} reads up to {FORMAT_VERSION}; "
            "expected a newer agd_fast"
        )
    missing = sorted({"base_class", "omega_offset", "prediction_type", "adapter", "layout", "about"} - set(config))
    if missing:
        raise ValueError(f"{path} lacks the entries {missing}")
    try:
        AdapterConfig.from_dict(config["adapter"])
        Layout.from_dict(config["layout"])
        _calibration(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe an adapter: {error!r}") from error
    return config


def _prediction_type(model: Any) -> str | None:
    """The prediction type of a Teacher or a pipeline; None for a bare denoiser, which does not tell."""
    scheduler = getattr(model, "scheduler", None)
    return None if scheduler is None else prediction_type_of(scheduler)


def read_adapter(directory: Path, config: dict[str, Any]) -> Adapter:
    """The adapter of a directory, on the CPU; config: its `read_config`.

    Raises: FileNotFoundError, ValueError when the weights are missing, damaged, not finite or not those of `config`.
    """
    path = directory / WEIGHTS_NAME
    tensors, metadata = read_tensors(path)
    if metadata.get("config_id") != _config_id(config):
        raise ValueError(f"{path} and {CONFIG_NAME} do not belong together; expected both from one agd_fast.save(...)")
    with torch.device("meta"):  # no random initialisation: loading leaves the caller's random numbers alone
        adapter = Adapter(AdapterConfig.from_dict(config["adapter"]), Layout.from_dict(config["layout"]))
    expected = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        name = differing[0]
        raise ValueError(
            f"{path} differs from its config in {len(differing)} tensors, first {name!r}: "
            f"expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        )
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor).all():
            what = "values that are not finite" if tensor.is_floating_point() else tensor.dtype
            raise ValueError(f"{path} holds no weights in {name!r}: expected finite numbers of floating point, found {what}")
    adapter.to_empty(device="cpu").load_state_dict(tensors)
    adapter.calibrate(_calibration(config))
    return adapter


def _calibration(config: Mapping[str, Any]) -> Calibration | None:
    """Raises: TypeError, ValueError when the entry is not a calibration."""
    found = config.get("calibration")
    return None if found is None else Calibration.from_dict(found)


def _same_layout(directory: Path, found: Layout, expected: Layout) -> None:
    """Raises: ValueError naming the first difference between a stored adapter and this base."""
    if found == expected:
        return
    stored, base = ({(kind, s.path): s for kind, sites in layout.sites.items() for s in sites} for layout in (found, expected))
    if stored.keys() != base.keys():
        extra, missing = sorted(stored.keys() - base.keys()), sorted(base.keys() - stored.keys())
        raise ValueError(
            f"{directory} holds an adapter for {len(stored)} sites, this base has {len(base)}: "
            f"not in the base {_paths(extra)}, not in the adapter {_paths(missing)}"
        )
    for key, site in stored.items():
        if site != base[key]:
            raise ValueError(
                f"width mismatch at {site.path!r}: the adapter in {directory} has {site.input_width} → {site.width} channels, "
                f"this base {base[key].input_width} → {base[key].width}"
            )
    raise ValueError(
        f"{directory} holds an adapter for embeddings of width t={found.time_width}, {dict(found.condition_widths)}; "
        f"this base has t={expected.time_width}, {dict(expected.condition_widths)}"
    )


def _paths(keys: list[tuple[str, str]]) -> list[str] | str:
    return [path for _, path in keys[:3]] or "none"


def _config_id(config: dict[str, Any]) -> str:
    """A hash that ties weights to their config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
