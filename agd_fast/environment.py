"""What is installed, what runs where, and what is attached."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from agd_fast.adapters import count_parameters
from agd_fast.attaching import attachment_of, denoiser_of
from agd_fast.engine import engine_of
from agd_fast.memory.extension import extension_info
from agd_fast.ops import kernels_info
from agd_fast.version import __version__

_PACKAGES = ("torch", "diffusers", "accelerate", "safetensors", "triton")


def environment() -> dict[str, str]:
    """Versions and devices, for reports and bug reports."""
    versions = {name: _version(name) for name in _PACKAGES}
    cuda = torch.cuda.is_available()
    return {
        "agd_fast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **versions,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": str(torch.get_num_threads()),
        "kernels": f"do not run: {missing}" if (missing := kernels_info()["missing"]) else "can run",
        "extension": _extension(),
    }


def info(model: Any = None) -> dict[str, Any]:
    """The environment and, given a model, its adapter and its engine.

    Of the adapter: kind, sites, parameters, fraction of the base's parameters, whether it is armed. Of the engine: whether it
    runs, and if not, why; what it captured; the size in bytes of what it computed ahead in the last run.
    """
    found: dict[str, Any] = {"environment": environment()}
    if model is None:
        return found
    denoiser = denoiser_of(model)
    base = count_parameters(denoiser)
    found["denoiser"] = {"class": type(denoiser).__name__, "parameters": base}
    found["engine"] = None if (engine := engine_of(denoiser)) is None else engine.info()
    attachment = attachment_of(denoiser)
    if attachment is None:
        found["adapter"] = None
        return found
    adapter = attachment.adapter
    parameters = count_parameters(adapter)
    found["adapter"] = {
        "kind": adapter.config.kind,
        "hidden": adapter.config.hidden,
        "sites": [site.adapter.site.path for site in attachment.sites],
        "parameters": parameters,
        "fraction": parameters / base,
        "guidance_range": list(adapter.config.guidance_range),
        "enabled": attachment.enabled,
        "armed": attachment.omega is not None,
    }
    return found


def _extension() -> str:
    found = extension_info()
    if not found["loaded"]:
        return f"PyTorch stands in for it: {found['reason']}"
    return f"loaded, CUDA {found['cuda']}, for {' '.join(found['architectures'])}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
