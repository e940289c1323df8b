"""Pipelines and denoisers on the engine beside the same without it, and what runs in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agd_fast as agd
from agd_fast.attaching.scope import scope_of
from agd_fast.engine import engine_of
from agd_fast.engine.pieces import Pieces
from agd_fast.engine.recording import Use
from agd_fast.engine.tables import Table
from agd_fast.graph.partition import Part
from agd_fast.graph.repeats import Call
from helpers_pipelines import attach, noise, sample
from tiny import sd15
from tiny._parts import quiet

SCALE = 4.0


def small_unet() -> nn.Module:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "mid_block_type": None, "up_block_types": ("UpBlock2D",)}
    return sd15.unet(**blocks, block_out_channels=(8,))


def unet_inputs(count: int = 2) -> dict[str, Tensor]:
    prompt = torch.randn(count, 5, 16, generator=torch.Generator().manual_seed(0))
    return {"sample": noise(count), "timestep": torch.tensor(500), "encoder_hidden_states": prompt}


def small_pipeline() -> StableDiffusionPipeline:
    return quiet(StableDiffusionPipeline(**{**sd15.components(), "unet": small_unet()}))


def twins(pipeline: Any = small_pipeline, **config: Any) -> tuple[Any, Any]:
    """Two pipelines with the same weights and adapters, the second one optimized."""
    plain, fast = pipeline(), pipeline()
    for pipe in (plain, fast):
        attach(pipe, **config)
    return plain, agd.optimize(fast)


def call(pipe: Any, **arguments: Any) -> Tensor:
    return sample(pipe, sd15.FAMILY, **{"guidance_scale": SCALE, **arguments})


def assert_same(found: Tensor, plain: Tensor) -> None:
    """Equal to the rounding of float32, over several steps of a pipeline too."""
    assert found.shape == plain.shape and found.dtype == plain.dtype
    assert plain.isfinite().all()
    assert (found - plain).abs().max() <= 2**-15 * plain.abs().max()


def differs(one: Tensor, other: Tensor) -> bool:
    """By more than any rounding."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return True
    return bool((one - other).abs().max() > 1e-3 * other.abs().max())


@contextmanager
def own_forwards(denoiser: nn.Module) -> Iterator[list[int]]:
    """One entry for every run of the denoiser's own forward, recordings included; none for what the engine runs instead."""
    cls: Any = next(cls for cls in type(denoiser).__mro__ if "forward" in vars(cls))
    own, seen = cls.forward, []

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is denoiser:
            seen.append(1)
        return own(self, *args, **kwargs)

    cls.forward = forward
    try:
        yield seen
    finally:
        cls.forward = own


class Holder:
    """A denoiser with an adapter, where pipelines have it."""

    def __init__(self):
        self.unet = small_unet()
        attach(self.unet)


RECORDED = 2  # runs of its own forward in a call that is captured: one for its output, one on fake tensors


class Reading(TorchDispatchMode):
    """What is read by the operations inside, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        self.read |= {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        return func(*args, **(kwargs or {}))

    def has_read(self, module: nn.Module) -> bool:
        return module.weight.untyped_storage().data_ptr() in self.read  # type: ignore[union-attr, operator]


def tables(denoiser: nn.Module) -> list[Table]:
    """Those of the scope that the denoiser is in."""
    runs = [run for kept in scope_of(denoiser).store.values() if isinstance(kept, Use) for run in kept.runs]
    return [run.prepared.table for run in runs if run.prepared.table is not None]


def programs(denoiser: nn.Module) -> list[Any]:
    return engine_of(denoiser)._programs


def in_pieces(part: Part, calls: Sequence[Call]) -> Pieces:
    """A part as calls of pieces that run as they are."""
    return Pieces(part, calls, lambda piece, given: piece.forward)


def reasons(model: Any) -> list[str]:
    return agd.info(model)["engine"]["plain_because"]


def add_lora(pipe: Any, name: str = "style") -> None:
    torch.manual_seed(2)
    targets = ["to_q", "to_k", "conv1"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False), name)
