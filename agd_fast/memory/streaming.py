"""Forwards of a model that does not fit on the card: its weights come from host memory, one layer at a time."""

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
    """Whether hooks of diffusers can bring the module's weights. They cannot if another library keeps the weights in its own
    format, if the module is compiled, or for a VAE in float16 that pipelines cast to float32 for a while."""
    supported = getattr(module, "_supports_group_offloading", True)  # set by models of diffusers
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
    """Most bytes of weights that streaming has on a card: one layer computes while the next is loaded."""
    sizes = [sum(tensor.nbytes for tensor in (*part.parameters(False), *part.buffers(False))) for part in module.modules()]
    return sum(sorted(sizes)[-2:])


@contextmanager
def streamed(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """diffusers' own group offloading, by layers, removed again afterwards: inside, forwards run on `device`, while weights are
    in host memory. On CUDA, the next layer is loaded from pinned memory while one computes.

    modules: on the CPU. Afterwards weights may be on either device; their bits are unchanged.
    """
    with unhooked_after(modules):
        try:
            for module in modules:
                apply_group_offloading(module, device, HOST, offload_type="leaf_level", use_stream=device.type == "cuda")
            yield
        finally:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # a layer may still be loading
            for module, name in product(modules, _HOOKS):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(name)


def unhooked_after(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Afterwards, the attributes that hooks set on a module and leave behind when they are removed are as they were before."""
    return restoring([part for module in modules for part in module.modules()], _SET)


def unpin(modules: Iterable[nn.Module]) -> None:
    """Move streamed weights out of pinned memory, which is scarce."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_pinned():
                tensor.data = tensor.data.clone()
    if torch.cuda.is_initialized():
        torch._C._host_emptyCache()


def offloads(module: nn.Module) -> bool:
    """Whether hooks of diffusers or accelerate, put on it by somebody else, bring its weights."""
    return any(
        isinstance(getattr(part, "_hf_hook", None), AlignDevicesHook)
        or ((own := getattr(part, "_diffusers_hook", None)) is not None and own.get_hook("group_offloading") is not None)
        for part in module.modules()
    )
