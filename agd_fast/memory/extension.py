"""The compiled extension `agd_fast._cuda`: how it is loaded, or why it is not, and on which cards its kernels run."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import torch


@functools.cache
def _loaded() -> tuple[Any, str]:
    """The module and "", or None and the reason."""
    if torch.version.hip is not None:
        return None, "expected PyTorch with CUDA, found one with ROCm"
    try:
        return import_module("agd_fast._cuda"), ""
    except ModuleNotFoundError as error:
        if error.name != "agd_fast._cuda":
            return None, f"agd_fast._cuda does not load: {error}"
        return None, "agd_fast._cuda was not built: there was no nvcc when agd_fast was installed, or AGD_FAST_BUILD_EXT was 0"
    except ImportError as error:  # built for another Python, or a library that it links to is missing
        return None, f"agd_fast._cuda does not load: {error}"


def extension() -> Any:
    """The module `agd_fast._cuda`, or None. Never raises."""
    return _loaded()[0]


def extension_info() -> dict[str, Any]:
    """Whether the extension is loaded, the reason if it is not, its architectures and the CUDA version it was built with.

    An architecture is "sm_90", or "compute_90" where the driver compiles for later cards. Needs no GPU, never raises.
    """
    module, reason = _loaded()
    if module is None:
        return {"loaded": False, "reason": reason, "architectures": [], "cuda": None}
    return {"loaded": True, "reason": "", "architectures": module.architectures.split(), "cuda": module.cuda}


@functools.cache
def extension_on(index: int) -> Any:
    """The module if it has code for this CUDA device, else None; PyTorch is used instead then."""
    module = extension()
    if module is None or not covers(module.architectures.split(), torch.cuda.get_device_capability(index)):
        return None
    return module


def covers(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for such architectures runs on a card: "sm_" from its minor version on, "compute_" from its version on."""
    for one in architectures:
        kind, _, digits = one.partition("_")
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False
