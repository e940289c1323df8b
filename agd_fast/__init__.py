"""agd-fast: one forward a step where classifier-free guidance needs two.

Adapter Guidance Distillation (Perez Jensen & Sadat, arXiv 2503.07274) on frozen diffusion models.
"""

from agd_fast import datasets
from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import attach, disabled, guided, share, unload
from agd_fast.distillation import DistillResult, TrainConfig, distill
from agd_fast.engine import EngineConfig, optimize
from agd_fast.environment import info
from agd_fast.families.discovery import discover
from agd_fast.guiders import AdapterGuidance
from agd_fast.hub import push_to_hub
from agd_fast.memory import estimate_memory, frozen_backward
from agd_fast.pipeline_evaluation import evaluate_pipeline
from agd_fast.reference import convert
from agd_fast.sampling import sample
from agd_fast.spec import Condition, DenoiserSpec, PipelineSpec, Site
from agd_fast.storage import load, save
from agd_fast.teacher import Teacher
from agd_fast.version import __version__

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
