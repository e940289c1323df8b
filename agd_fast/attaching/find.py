"""The denoisers of whatever a user holds: a Teacher, a pipeline, a compiled module or a denoiser itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from agd_fast.spec import DenoiserSpec

_NAMES = ("denoiser", "transformer", "unet", "prior", "decoder")


def denoiser_of(model: Any) -> nn.Module:
    """The denoiser of a Teacher, a diffusers pipeline, a compiled module or a denoiser; the first where there are several.

    Raises: TypeError.
    """
    return uncompiled(component_of(model))


def component_of(model: Any) -> nn.Module:
    """As `denoiser_of`, but the compiled module if it is compiled."""
    for name in _NAMES:
        inner = None if isinstance(model, nn.Module) else getattr(model, name, None)
        if isinstance(inner, nn.Module):
            model = inner
            break
    if not isinstance(model, nn.Module):
        raise TypeError(
            "expected a denoiser (nn.Module), an agd_fast.Teacher or a diffusers pipeline with a unet or transformer, "
            f"found {type(model).__name__}"
        )
    return model


def components_of(model: Any, spec: DenoiserSpec) -> dict[str, nn.Module]:
    """The denoisers of a pipeline by component name, as compiled modules if compiled; of anything else one, named ""."""
    found = {} if isinstance(model, nn.Module) else {name: getattr(model, name, None) for name in spec.pipeline.components}
    components = {name: module for name, module in found.items() if isinstance(module, nn.Module)}
    return components or {"": component_of(model)}


def uncompiled(module: nn.Module) -> nn.Module:
    return getattr(module, "_orig_mod", module)  # torch.compile


def bring(module: nn.Module, device: torch.device) -> None:
    if next(module.parameters()).device != device:
        with torch.inference_mode(False):  # inference tensors could never be trained again
            module.to(device)


def bring_embedders(denoiser: nn.Module, spec: DenoiserSpec, device: torch.device) -> None:
    """Make the base's embedders of t and c callable outside of its own forward: they may be offloaded, or sharded by FSDP2.

    What lies on "meta" is left to accelerate, which offloads parameter by parameter.
    """
    for name in (*spec.time_embedding, *(name for condition in spec.adapted for name in condition.embedding)):
        module = denoiser.get_submodule(name)
        parameters = list(module.parameters())
        if not parameters:
            continue
        if parameters[0].device.type != "meta":
            bring(module, device)
        if hasattr(parameters[0], "full_tensor"):
            _owner(denoiser, name).unshard()  # its own next forward shards it again


def _owner(denoiser: nn.Module, path: str) -> Any:
    """The FSDP2 module at or above `path` that holds its parameters."""
    names = path.split(".")
    above = (denoiser.get_submodule(".".join(names[:count])) for count in range(len(names), -1, -1))
    return next(module for module in above if hasattr(module, "unshard"))


@contextmanager
def own_modules(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the denoiser's own modules take the places of the wrappers that LoRA and torch.compile have put around them, and
    so have their original names."""
    wrappers = {name: module for name, module in denoiser.named_modules() if _wrapped(module) is not module}
    for name, wrapper in reversed(wrappers.items()):  # nested wrappers from the inside out
        denoiser.set_submodule(name, _wrapped(wrapper))
    try:
        yield
    finally:
        for name, wrapper in wrappers.items():
            denoiser.set_submodule(name, wrapper)


def _wrapped(module: nn.Module) -> nn.Module:
    """The module inside a wrapper of LoRA or torch.compile; any other module itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else uncompiled(module)
