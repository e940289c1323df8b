"""The arms that are compared: ways to make one pass do the work of two, each with a size, a source of states and a seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from agd_fast import AdapterConfig
from agd_fast.adapters.config import Kind
from agd_fast.distillation.config import learning_rate_of
from agd_fast.trajectories.collect import Source

FORMS = ("ours", "paper")
FULL, TEXT = "full", "text_embedding"
OTHER_RATES = {FULL: 5e-4, TEXT: 1e-3}


@dataclass(frozen=True)
class Arm:
    """One student to train and to score.

    kind: of the adapter; FULL trains all of the base's weights (the ceiling), TEXT only changes the text embedding.
    form: "paper" has random Fourier features of ω, no factor (ω − 1) and an unweighted loss.
    fraction: the most parameters, as a share of the base's; None leaves it to the kind.
    steps: of training, for every source. trajectories: how many to train on; keep: states kept of each, None for all.
    """

    kind: str
    form: str = "ours"
    fraction: float | None = None
    source: str = "trajectories"
    seed: int = 0
    steps: int = 800
    learning_rate: float = 0.0
    trajectories: int = 400
    keep: int | None = None

    @property
    def states(self) -> str:
        return f"{self.trajectories}" if self.keep is None else f"{self.trajectories}x{self.keep}"

    @property
    def name(self) -> str:
        size = "" if self.fraction is None else f"-{self.fraction:g}"
        return f"{self.kind}-{self.form}{size}-{self.source}-{self.states}-lr{self.learning_rate:g}-{self.steps}-seed{self.seed}"

    @property
    def adapter(self) -> AdapterConfig:
        paper: dict[str, Any] = {"omega_features": "fourier", "identity_at_one": False} if self.form == "paper" else {}
        return AdapterConfig(kind=self.kind, max_fraction=self.fraction or 0.05, **paper)

    @property
    def weighting(self) -> Any:
        return "uniform" if self.form == "paper" else "omega"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def parse_arm(text: str) -> tuple[str, str]:
    """'modulation' or 'modulation:paper' → kind and form.

    Raises: ValueError naming what was expected.
    """
    kind, _, form = text.partition(":")
    form = form or "ours"
    known = (*get_args(Kind), FULL, TEXT)
    unknown = [part for part in kind.split("+") if part not in known]
    if unknown or form not in FORMS or (kind in (FULL, TEXT) and form != "ours"):
        raise ValueError(f"expected KIND or KIND:paper with KIND of {', '.join(known)}, several joined by '+'; found {text!r}")
    return kind, form


def make_arms(
    adapters: list[str],
    fractions: list[float],
    sources: list[str],
    seeds: list[int],
    steps: int,
    learning_rates: list[float] | None = None,
    trajectories: int = 400,
    keep: int | None = None,
) -> list[Arm]:
    """Every combination, seed by seed; FULL and TEXT are trained once a seed, on guided trajectories.

    learning_rates: None takes each kind's default.
    """
    if unknown := sorted(set(sources) - set(get_args(Source))):
        raise ValueError(f"expected sources of {', '.join(get_args(Source))}; found {', '.join(unknown)}")
    arms = []
    for seed in seeds:
        for kind, form in map(parse_arm, adapters):
            other = kind in OTHER_RATES
            rates = learning_rates or [OTHER_RATES[kind] if other else learning_rate_of(kind.split("+"))]
            for fraction in [None] if other else fractions:
                for source in ["trajectories"] if other else sources:
                    arms += [Arm(kind, form, fraction, source, seed, steps, rate, trajectories, keep) for rate in rates]
    return arms
