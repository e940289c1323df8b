"""Forwards of a model that the card does not hold: its weights come from host memory, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product

import torch
from accelerate.hooks import AlignDevicesHook
from diffusers.hooks import HookRegistry, apply_group_offloading
from torch import nn

from agd_fast.attaching.find import uncompiled
from agd_fast.freezing import restoring

HOST = torch.device("cpu")
_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")  # of diffusers
_SET = ("_diffusers_hook", "forward")


def streamable(module: nn.Module) -> bool:
    """Whether hooks of diffusers can bring its weights: not those that another library keeps in its own way, nor into what is
    compiled, nor a VAE in float16 that pipelines cast to float32 for a while."""
    supported = getattr(module, "_supports_group_offloading", True)  # said by models of diffusers
    plain = uncompiled(module) is module and module._compiled_call_impl is None
    cast = getattr(getattr(module, "config", None), "force_upcast", False)
    weights = list(module.parameters())
    return (
        supported
        and plain
        and all(type(weight) is nn.Parameter for weight in weights)
        and not (cast and any(weight.dtype == torch.float16 for weight in weights))
    )


def two_largest_layers(module: nn.Module) -> int:
    """Bytes of weights that streaming has on a card at most: one layer computes while the next comes."""
    sizes = [sum(tensor.nbytes for tensor in (*part.parameters(False), *part.buffers(False))) for part in module.modules()]
    return sum(sorted(sizes)[-2:])


@contextmanager
def streamed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """diffusers' own group offloading, by layers, taken off again: inside, forwards run on `device`, while weights lie in host
    memory. On CUDA the next layer comes while one computes, from pinned memory.

    modules: on the CPU. Afterwards weights may be on either device; their bits are what they were.
    """
    with unhooked_after(modules):
        try:
            for module in modules:
                apply_group_offloading(module, device, HOST, offload_type="leaf_level", use_stream=device.type == "cuda")
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a layer may be on its way
            for module, name in product(modules, _HOOKS):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name)


def unhooked_after(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """What is set on a module for hooks around its forward, and left there when they go, is as it was afterwards."""
    return restoring([part for module in modules for part in module.modules()], _SET)


def unpin(modules: Iterable[nn.Module]) -> None:
    """Weights that were streamed lie in pinned memory, which a system has little of."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_pinned():
                tensor.data = tensor.data.clone()
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()


def offloads(module: nn.Module) -> bool:
    """Whether hooks that somebody put on it, of diffusers or accelerate, bring its weights."""
    return any(
        isinstance(getattr(part, "_hf_hook", None), AlignDevicesHook)
        or ((own := getattr(part, "_diffusers_hook", None)) is not None and own.get_hook("group_offloading") is not None)
        for part in module.modules()
    )
