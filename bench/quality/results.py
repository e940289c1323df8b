"""What a merged result file says: arms over their seeds, beside CFG, against the bars."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import t

from agd_fast.files import read_json
from quality.arms import FULL

MISSING = "not measured yet"
RECIPE = ("kind", "form", "fraction", "source", "steps")
EXPLAINED_LIMITS = {("digits", "dit", 0.05): 0.85, ("digits", "unet", 0.05): 0.90, ("digits", "unet", 0.02): 0.85}
FULL_MARGIN, FRECHET_LIMIT, ACCURACY_LIMIT, RMSE_LIMIT = -0.05, 1.05, 0.01, 0.35
FINALIST_SEEDS = 3
MODEL_NAMES = {"dit": "DiT", "unet": "UNet"}


@dataclass(frozen=True)
class Bar:
    """A limit and one arm's values against it, one per seed.

    side: of the limit, "min", "max", or "abs" for a limit on both signs.
    """

    name: str
    side: str
    limit: float
    values: list[float]

    @property
    def bound(self) -> float | None:
        """One-sided 95 % bound of the mean (Student's t) towards the limit; None for one value."""
        if len(self.values) < 2:
            return None
        mean, spread = statistics.mean(self.values), statistics.stdev(self.values)
        reach = float(t.ppf(0.95, len(self.values) - 1)) * spread / len(self.values) ** 0.5
        return {"min": mean - reach, "max": mean + reach, "abs": abs(mean) + reach}[self.side]

    @property
    def verdict(self) -> str:
        if self.bound is None:
            return MISSING
        cleared = self.bound >= self.limit if self.side == "min" else self.bound <= self.limit
        return "cleared" if cleared else "MISSED"


@dataclass(frozen=True)
class Group:
    """One arm over its seeds."""

    arm: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def recipe(self) -> tuple:
        """All but the learning rate and the seed."""
        return tuple(self.arm[name] for name in RECIPE)

    @property
    def first_explained(self) -> float:
        return first_seed(self.rows)["explained"]["guided"]["mean"]

    def explained(self, states: str = "guided") -> list[float]:
        return [row["explained"][states]["mean"] for row in self.rows if states in row["explained"]]

    def curve(self, value: Callable[[dict[str, Any]], Mapping[str, float]]) -> dict[float, float]:
        """The mean over seeds of what `value` finds in a row, x → y."""
        return mean_curve([value(row) for row in self.rows])

    def where_calibrated(self, omega: str | None) -> tuple[Group, Group]:
        """The rows that were also drawn at this ω after a calibration: as measured without it, and with it."""
        rows = [row for row in self.rows if omega in row.get("calibrated", {}).get("images", {})]
        return Group(self.arm, rows), Group({**self.arm, "calibrated": True}, [{**row, **row["calibrated"]} for row in rows])


def first_seed(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return min(rows, key=lambda row: row["arm"]["seed"])


def mean_curve(curves: Sequence[Mapping[str, float]]) -> dict[float, float]:
    """The mean at each point, over the curves that have it."""
    points = sorted({x for curve in curves for x in curve}, key=float)
    return {float(x): statistics.mean(curve[x] for curve in curves if x in curve) for x in points}


def nfe_curves(claims: Iterable[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """Label → NFE → Fréchet distance, of the claim equal_nfe, whose values are named "CFG 5 steps, NFE 10"."""
    curves: dict[str, dict[float, float]] = {}
    for claim in claims:
        for name, value in claim["values"].items() if claim["claim"] == "equal_nfe" else ():
            if found := re.fullmatch(r"(.+) \d+ steps, NFE (\d+)", name):
                curves.setdefault(found[1], {})[float(found[2])] = value
    return curves


def group_rows(rows: Iterable[dict[str, Any]]) -> list[Group]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row["arm"][name] for name in (*RECIPE, "learning_rate")), []).append(row)
    return [Group({**first_seed(same)["arm"]}, same) for same in found.values()]


def best_rates(groups: Iterable[Group]) -> list[Group]:
    """Of the learning rates of a recipe, the one that explains most with the first seed; sorted, best first."""
    best: dict[tuple, Group] = {}
    for group in groups:
        if group.recipe not in best or group.first_explained > best[group.recipe].first_explained:
            best[group.recipe] = group
    return sorted(best.values(), key=lambda group: -statistics.mean(group.explained()))


def best_scale(references: Sequence[Mapping[str, Any]]) -> str | None:
    """The ω of CFG's lowest Fréchet distance, in the mean over seeds."""
    if not references:
        return None
    shared = set.intersection(*(set(reference["cfg"]) for reference in references))
    return min(
        sorted(shared, key=float),
        key=lambda omega: statistics.mean(ref["cfg"][omega]["frechet"] for ref in references),
        default=None,
    )


def beside_cfg(group: Group, references: Mapping[int, Mapping[str, Any]], omega: str | None, name: str) -> list[float]:
    """One value per seed, against CFG's images from the same noise: Fréchet or FID ratio, accuracy difference, RMSE ratio.

    The RMSE ratio is the arm's RMSE to CFG over that of unguided. Seeds without the measurement have no value.
    """
    values = []
    for row in group.rows:
        reference = references.get(row["arm"]["seed"])
        if omega is None or reference is None or omega not in row["images"]:
            continue
        images, cfg = row["images"][omega], reference["cfg"][omega]
        if name not in images or (name != "rmse" and name not in cfg):
            continue
        if name in ("frechet", "fid"):
            values.append(images[name] / cfg[name])
        elif name == "accuracy":
            values.append(images["accuracy"] - cfg["accuracy"])
        else:
            values.append(images["rmse"] / reference["unguided_rmse"][omega])
    return values


def minus_full(group: Group, full: Group | None) -> list[float]:
    """Explained minus that of the full fine-tune with the same seed, or minus its mean if it lacks that seed."""
    if full is None or not full.rows:
        return []
    ceiling = {row["arm"]["seed"]: row["explained"]["guided"]["mean"] for row in full.rows}
    mean = statistics.mean(ceiling.values())
    return [row["explained"]["guided"]["mean"] - ceiling.get(row["arm"]["seed"], mean) for row in group.rows]


def zero_adapter(references: Sequence[Mapping[str, Any]], omega: str, steps: int) -> Group:
    """An adapter that does nothing: its images are the unguided ones."""
    arm = {"kind": "zero", "form": "ours", "fraction": 0.05, "source": "trajectories", "steps": steps, "learning_rate": 0.0}
    rows = [
        {
            "arm": {**arm, "seed": reference["seed"]},
            "explained": {"guided": {"mean": 0.0}},
            "images": {omega: {**reference["unguided"], "rmse": reference["unguided_rmse"][omega]}},
        }
        for reference in references
    ]
    return Group(arm, rows)


class Result:
    """A merged file, grouped."""

    def __init__(self, file: Path) -> None:
        self.file, self.name, self.merged = file, file.stem, read_json(file)
        self.references = {reference["seed"]: reference for reference in self.merged["references"]}
        self.omega = best_scale(self.merged["references"])
        self.groups = group_rows(self.merged["rows"])
        self.chosen = best_rates(self.groups)
        self.finalists = [
            group
            for group in sorted(self.groups, key=lambda group: -statistics.mean(group.explained()))
            if len(group.rows) >= FINALIST_SEEDS and group.arm["kind"] != FULL
        ]

    @property
    def has_fid(self) -> bool:
        """Whether images were measured in Inception's features too."""
        return any("fid" in reference["unguided"] for reference in self.references.values())

    @property
    def title(self) -> str:
        teacher = self.merged["teacher"]
        return f"{teacher['data']}, {MODEL_NAMES[teacher['model']]}"

    def full(self, steps: int) -> Group | None:
        """The full fine-tune with this number of training steps, if any."""
        return next((group for group in self.chosen if group.arm["kind"] == FULL and group.arm["steps"] == steps), None)

    def beside_cfg(self, group: Group, name: str) -> list[float]:
        return beside_cfg(group, self.references, self.omega, name)

    def label(self, group: Group) -> str:
        """Kind and what sets the arm apart; steps and states only if arms differ in them."""
        arm = group.arm
        parts = [{FULL: "full fine-tune", "zero": "zero adapter"}.get(arm["kind"], arm["kind"].replace("_", " "))]
        parts += ["paper form"] if arm["form"] == "paper" else []
        parts += [] if arm["fraction"] is None or arm["kind"] == "zero" else [f"{arm['fraction']:.0%}"]
        parts += [] if arm["source"] == "trajectories" else [f"on {arm['source']}"]
        parts += ["calibrated"] if arm.get("calibrated") else []
        parts += [f"{arm['steps']:,} steps"] if len({other.arm["steps"] for other in self.groups}) > 1 else []
        if len({other.arm["keep"] for other in self.groups}) > 1 and arm["kind"] != "zero":
            parts += ["all states" if arm["keep"] is None else f"{arm['keep']} states"]
        return ", ".join(parts)

    def bars(self, group: Group) -> list[Bar]:
        teacher, arm = self.merged["teacher"], group.arm
        limit = EXPLAINED_LIMITS.get((teacher["data"], teacher["model"], arm["fraction"]))
        full = self.full(arm["steps"])
        if full is not None and arm.get("calibrated"):  # like is compared with like
            full = full.where_calibrated(self.omega)[1]
        at = f"at ω = {self.omega}"
        bars = [] if limit is None else [Bar("guidance explained", "min", limit, group.explained())]
        return [
            *bars,
            Bar("explained − full fine-tune's", "min", FULL_MARGIN, minus_full(group, full)),
            Bar(f"Fréchet AGD / CFG {at}", "max", FRECHET_LIMIT, self.beside_cfg(group, "frechet")),
            *([Bar(f"FID AGD / CFG {at}", "max", FRECHET_LIMIT, self.beside_cfg(group, "fid"))] if self.has_fid else []),
            Bar(f"accuracy AGD − CFG {at}, either sign", "abs", ACCURACY_LIMIT, self.beside_cfg(group, "accuracy")),
            Bar(f"RMSE to CFG, AGD / unguided {at}", "max", RMSE_LIMIT, self.beside_cfg(group, "rmse")),
        ]
