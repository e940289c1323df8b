"""Switching the engine on and off for a denoiser."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from agd_fast.attaching import attachment_of, components_of, require_known_call, spec_of, uncompiled, unwrap, wrap
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.engine import Engine
from agd_fast.ops import default_policy
from agd_fast.spec import DenoiserSpec

Model = TypeVar("Model")


def optimize(model: Model, config: EngineConfig | None = EngineConfig(), *, spec: DenoiserSpec | None = None) -> Model:  # noqa: B008
    """Run each step of a pipeline or a denoiser as one graph. Modifies its argument and returns it.

    What does not depend on x_t is computed before the first step. The engine acts inside a call of the pipeline,
    `agd_fast.sample` and `agd_fast.guided`, with an adapter armed and on the base as well. Outputs are equal up to rounding. The
    first forward pass at new shapes runs as before and is captured. If it cannot be captured (offloading hooks, code that asks
    for values of tensors that change during a call), the plain path runs, a warning says so once, and `agd_fast.info(model)` says
    why.
    config: None switches the engine off; everything is then as before.
    Raises: TypeError for an unknown denoiser without a spec; ValueError for a denoiser that is already compiled, for a pipeline
    that cannot have the adapter on its denoiser (as in `attach`), and for an unknown AGD_FAST_KERNELS.
    """
    if config is not None and config.kernels is None:
        default_policy()
    spec = spec_of(model, spec)
    if config is not None and attachment_of(model) is not None:
        require_known_call(model, spec)  # whose call will arm the adapter
    for component in components_of(model, spec).values():
        denoiser = uncompiled(component)
        engine = engine_of(denoiser)
        if engine is not None:
            denoiser._compiled_call_impl = None
        if config is None:
            continue
        if component is not denoiser or denoiser._compiled_call_impl is not None:
            raise ValueError(
                f"this {type(denoiser).__name__} is compiled by torch.compile already; expected it plain: the engine compiles "
                "what is left of a step itself (EngineConfig(compile=True))"
            )
        denoiser._compiled_call_impl = Engine(denoiser, spec, config)
    if config is not None:
        wrap(model)
    elif attachment_of(model) is None:
        unwrap(model)
    return model


def engine_of(denoiser: nn.Module) -> Engine | None:
    """The engine that stands in for a denoiser's call."""
    found: Any = getattr(uncompiled(denoiser), "_compiled_call_impl", None)
    found = getattr(found, "inner", found)  # during a call of a pipeline it is wrapped, to be watched
    return found if isinstance(found, Engine) else None
