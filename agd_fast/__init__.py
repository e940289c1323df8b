"""agd-fast: one forward pass per sampling step where classifier-free guidance needs two.

Adapter Guidance Distillation (AGD; Perez Jensen & Sadat, arXiv 2503.07274) on frozen diffusion models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agd_fast.version import __version__

if TYPE_CHECKING:  # a function named like its file comes from that file: mypy would take it for the module
    from agd_fast import datasets
    from agd_fast.adapters import AdapterConfig
    from agd_fast.attaching import disabled, guided, share, unload
    from agd_fast.attaching.attach import attach
    from agd_fast.distillation import DistillResult, TrainConfig
    from agd_fast.distillation.distill import distill
    from agd_fast.engine import EngineConfig
    from agd_fast.engine.optimize import optimize
    from agd_fast.environment import info
    from agd_fast.families.discovery import discover
    from agd_fast.guiders import AdapterGuidance
    from agd_fast.hub import push_to_hub
    from agd_fast.memory import estimate_memory
    from agd_fast.memory.frozen_backward import frozen_backward
    from agd_fast.pipeline_evaluation import evaluate_pipeline
    from agd_fast.reference.convert import convert
    from agd_fast.sampling import sample
    from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site
    from agd_fast.storage import load, save
    from agd_fast.teacher import Teacher

__all__ = [
    "AdapterConfig",
    "AdapterGuidance",
    "Condition",
    "DenoiserSpec",
    "DistillResult",
    "EngineConfig",
    "PipelineSpec",
    "Site",
    "Teacher",
    "TrainConfig",
    "__version__",
    "attach",
    "convert",
    "datasets",
    "disabled",
    "discover",
    "distill",
    "estimate_memory",
    "evaluate_pipeline",
    "frozen_backward",
    "guided",
    "info",
    "load",
    "optimize",
    "push_to_hub",
    "sample",
    "save",
    "share",
    "unload",
]

# the imports above, made when a name is first used: importing diffusers takes seconds
_HOMES = {
    "adapters": ("AdapterConfig",),
    "attaching": ("attach", "disabled", "guided", "share", "unload"),
    "distillation": ("DistillResult", "TrainConfig", "distill"),
    "engine": ("EngineConfig", "optimize"),
    "environment": ("info",),
    "families.discovery": ("discover",),
    "guiders": ("AdapterGuidance",),
    "hub": ("push_to_hub",),
    "memory": ("estimate_memory", "frozen_backward"),
    "pipeline_evaluation": ("evaluate_pipeline",),
    "reference": ("convert",),
    "sampling": ("sample",),
    "spec": ("Condition", "DenoiserSpec", "PipelineSpec", "Site"),
    "storage": ("load", "save"),
    "teacher": ("Teacher",),
}
_HOME = {name: f"{__name__}.{home}" for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # type checkers see the imports above, and no other names

    def __getattr__(name):
        """A name in `__all__` from the module in `_HOME`, or a submodule of the package."""
        from importlib import import_module
        from importlib.util import find_spec

        if name in _HOME:
            globals()[name] = found = getattr(import_module(_HOME[name]), name)
            return found
        if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
