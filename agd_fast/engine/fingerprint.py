"""Everything of a model that its captured forward took for granted, so that a change of it is seen.

Weights by identity, version, dtype and device; modules, hooks and processors by identity; flags and scales (those of LoRA among
them) by value. A write through `tensor.data` has no version: between runs nothing depends on it, as nothing computed ahead
outlives a run; inside a run torch itself cannot tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from agd_fast.attaching.attachment import ROOT, SITES
from agd_fast.attaching.hooks import change_argument, change_output, finish_forward, prepare_forward
from agd_fast.attaching.scope import SCOPE

_OUR_HOOKS = (change_argument, change_output, finish_forward, prepare_forward)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_SKIPPED = {ROOT, SITES, SCOPE, "_modules", "_compiled_call_impl", *_HOOKS}
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
DEPTH = 3  # of containers and objects inside attributes


def fingerprint(roots: Iterable[nn.Module]) -> list[Any]:
    """What `same` compares; it keeps what it names alive, so that no identity is taken by something else."""
    found: list[Any] = []
    for root in roots:
        for module in root.modules():
            found += (module, type(module))
            for name, value in vars(module).items():
                if name in _HOOKS:
                    found += value.values()
                elif name not in _SKIPPED and not name.startswith(
                    ("_backward", "_state_dict", "_load_state_dict", "_non_persistent")
                ):
                    _add(found, value, DEPTH)
    return found


def same(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        a is b or (type(a) is type(b) and _equal(a, b)) for a, b in zip(one, other, strict=True)
    )


def obstacle(root: nn.Module) -> str:
    """Why this model's forward cannot be a graph, as far as its modules tell; empty where they do not."""
    for name, module in root.named_modules():
        where = f"{name or 'the denoiser'} ({type(module).__name__})"
        if getattr(module, "_hf_hook", None) is not None:
            return f"accelerate's {type(module._hf_hook).__name__} moves {where} in and out: switch its offloading off"
        if found := getattr(getattr(module, "_diffusers_hook", None), "hooks", None):
            return f"diffusers' hook {next(iter(found))!r} (offloading, caching, casting) acts on {where}"
        if module is not root and module._compiled_call_impl is not None:
            return f"{where} is compiled by itself"
        hooks = [hook for kind in _HOOKS for hook in getattr(module, kind).values() if hook not in _OUR_HOOKS]
        if hooks:
            return f"{where} has a hook that is not ours ({getattr(hooks[0], '__qualname__', hooks[0])})"
    tensors = (*root.named_parameters(), *root.named_buffers())
    for name, tensor in tensors:
        if tensor.is_inference():
            return f"{name} was made in torch.inference_mode, so that changes of it cannot be seen"
    return ""


def _add(found: list[Any], value: Any, depth: int) -> None:
    if isinstance(value, _PLAIN):
        found.append(value)
    elif isinstance(value, Tensor):
        found += (value, version(value), value.dtype, value.device, tuple(value.shape))
    elif isinstance(value, nn.Module):
        found.append(value)
    elif depth:
        children = list(_children(value))
        found.append(len(children) if isinstance(value, (Mapping, list, tuple, set, frozenset)) else value)
        for child in children:
            _add(found, child, depth - 1)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from (key, inner)
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    else:
        yield from getattr(value, "__dict__", {}).values()


def version(tensor: Tensor) -> int | None:
    """How often the tensor was written to; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return one == other or (one != one and other != other)
    return isinstance(one, (*_PLAIN, tuple, torch.device)) and one == other
