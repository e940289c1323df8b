"""What was measured of a pipeline's adapters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from agd_fast.environment import environment
from agd_fast.evaluation.costs import Cost
from agd_fast.evaluation.likeness import Scores


@dataclass(frozen=True)
class PipelineScale:
    """Results at one guidance scale.

    guidance_explained, guidance_strength: by denoiser (see `Explained`); empty if not asked for.
    arms: scores of unguided, cfg and agd.
    """

    guidance_explained: dict[str, float]
    guidance_strength: dict[str, float]
    arms: dict[str, Scores]

    @property
    def closeness(self) -> float:
        """RMSE of AGD's pictures to CFG's, divided by that of the unguided ones: 0 is CFG, 1 is no guidance."""
        agd, unguided = self.arms["agd"].rmse, self.arms["unguided"].rmse
        return agd / unguided if agd is not None and unguided else float("nan")


@dataclass(frozen=True)
class PipelineEvaluation:
    """Everything measured of one pipeline's adapters; `to_dict` is the content of report.json.

    adapters: kind, parameters and fraction of the base's parameters, by denoiser.
    pictures: number of pictures per arm and scale, from `prompts` different inputs.
    left_out: how many of these were not compared, because the picture of one arm was black all over.
    black: how many black pictures, by arm and scale.
    by_scale: results by guidance scale, in the model family's own convention.
    costs: by arm, the same at every scale but 1.
    networks: the network behind each metric.
    directory: where pictures and report are.
    seconds: duration of each phase of this call.
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
