"""Hooks that other libraries put on a module, usually to move or cast its weights or to keep its outputs."""

from __future__ import annotations

from torch import nn


def mover(module: nn.Module) -> str:
    """A description of the hook of accelerate or diffusers around this module's forward, whatever it does; empty if none."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        return f"accelerate's {type(hook).__name__}"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return f"diffusers' hook {next(iter(hooks))!r}" if hooks else ""
