"""What was measured of the adapters of a pipeline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agd_fast.environment import environment
from agd_fast.evaluation.costs import Cost
from agd_fast.evaluation.likeness import Scores


@dataclass(frozen=True)
class PipelineScale:
    """At one guidance scale. guidance_explained: by denoiser; empty where it was not asked for. arms: unguided, cfg and agd."""

    guidance_explained: dict[str, float]
    arms: dict[str, Scores]

    @property
    def closeness(self) -> float:
        """RMSE to CFG's pictures, of AGD's over the unguided ones': 0 is CFG, 1 is no guidance."""
        agd, unguided = self.arms["agd"].rmse, self.arms["unguided"].rmse
        return agd / unguided if agd is not None and unguided else float("nan")


@dataclass(frozen=True)
class PipelineEvaluation:
    """Everything measured of one pipeline's adapters; `to_dict` is what report.json holds.

    adapters: kind, parameters and share of the base's, by denoiser. pictures: an arm and scale, of `prompts` different inputs;
    left_out: how many of them were not compared, as one of the arms was black all over; black: whose, and how many, by arm and
    scale.
    by_scale: by guidance scale, in the family's own convention. costs: by arm, the same at every scale but 1.
    networks: which ones measured, by metric. directory: where pictures and report are. seconds: by phase, of this call.
    """

    pipeline: str
    adapters: dict[str, dict[str, Any]]
    prompts: int
    pictures: int
    left_out: int
    black: dict[str, int]
    steps: int
    seed: int
    by_scale: dict[str, PipelineScale]
    costs: dict[str, Cost]
    networks: dict[str, str]
    directory: Path
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=environment)

    @property
    def speedup_over_cfg(self) -> float | None:
        cfg, agd = self.costs["cfg"].timing, self.costs["agd"].timing
        return cfg.over(agd).median if cfg and agd else None

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        del found["directory"]
        return found | {"speedup_over_cfg": self.speedup_over_cfg}
