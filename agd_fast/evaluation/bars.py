"""The bars that a distilled adapter must clear to be called as good as CFG. A zero adapter must not clear them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from agd_fast.evaluation.evaluate import Evaluation


@dataclass(frozen=True)
class Bar:
    """One measured value and its bar. limit: the most (kind "max") or the least (kind "min") that it may be."""

    name: str
    value: float
    limit: float
    kind: str = "max"

    @property
    def cleared(self) -> bool:
        return self.value <= self.limit if self.kind == "max" else self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "value": self.value, self.kind: self.limit, "cleared": self.cleared}


def quality_bars(result: Evaluation) -> list[Bar]:
    """The bars that do not depend on the machine."""
    best = f"{result.guidance_scale:g}"
    arms = result.arms
    bars = [
        Bar("adapter parameters / base parameters", result.adapter["fraction"], 0.05),
        Bar("guidance explained", result.guidance_explained, 0.80, "min"),
        Bar(
            "Fréchet unguided / CFG (guidance matters)",
            arms["unguided"].frechet_distance / arms["cfg"].frechet_distance,
            3.0,
            "min",
        ),
        Bar(f"Fréchet AGD / CFG at ω = {best}, CFG's best", _frechet_ratio(result, best), 1.05),
    ]
    for omega in ("3", "4"):
        if omega in result.by_scale and omega != best:
            bars.append(Bar(f"Fréchet AGD / CFG at ω = {omega}", _frechet_ratio(result, omega), 1.15))
    cfg, agd = arms["cfg"].class_accuracy, arms["agd"].class_accuracy
    if cfg is not None and agd is not None:
        bars.append(Bar("|class accuracy AGD − CFG|", abs(agd - cfg), 0.01))
    rmse = result.rmse_to_cfg
    bars.append(Bar("RMSE to CFG, AGD / unguided", rmse["agd"] / rmse["unguided"], 0.40))
    return bars


def speed_bars(result: Evaluation) -> list[Bar]:
    """CFG/AGD relative to CFG/unguided: how much of the halving of passes shows in the time."""
    if not result.timing:
        return []
    timing = result.timing
    return [Bar("seconds, unguided / AGD", timing["unguided"].over(timing["agd"]).median, 0.85, "min")]


def _frechet_ratio(result: Evaluation, omega: str) -> float:
    scale = result.by_scale[omega]
    return scale.agd.frechet_distance / scale.cfg.frechet_distance
