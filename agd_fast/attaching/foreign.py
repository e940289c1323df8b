"""Hooks that other libraries put on a module, as a rule to move or cast its weights or to keep its outputs."""

from __future__ import annotations

from torch import nn


def mover(module: nn.Module) -> str:
    """The hook of accelerate or diffusers around this module's forward, whatever it does, in words; empty without."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        return f"accelerate's {type(hook).__name__}"
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return f"diffusers' hook {next(iter(hooks))!r}" if hooks else ""
