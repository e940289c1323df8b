"""Named groups of settings: `distill(..., preset="sdxl")`. Arguments that the caller gives take precedence over the preset."""

from __future__ import annotations

from dataclasses import dataclass, field

from agd_fast.adapters import AdapterConfig
from agd_fast.distillation.config import TrainConfig

TEXT_RANGE = (1.0, 12.0)


@dataclass(frozen=True)
class Preset:
    """What `distill` uses for settings that its caller leaves open.

    adapter: its guidance_range is in the standard convention (ω = 1 is no guidance).
    trajectories, sampling_steps, keep_steps: see `agd_fast.trajectories.collect`.
    """

    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    trajectories: int = 400
    sampling_steps: int | tuple[int, int] = (20, 30)
    keep_steps: int | None = None


def _paper(hidden: int, guidance_range: tuple[float, float], trajectories: int) -> Preset:
    """Perez Jensen & Sadat (arXiv 2503.07274), section 5: ω and loss in the paper's form, 5,000 steps at 1e-4."""
    adapter = AdapterConfig(
        "cross_attention", hidden, omega_features="fourier", identity_at_one=False, guidance_range=guidance_range
    )
    train = TrainConfig(steps=5000, batch_size=64, learning_rate=1e-4, weighting="uniform")
    return Preset(adapter, train, trajectories)


def _large(max_fraction: float, guidance_range: tuple[float, float] = TEXT_RANGE) -> Preset:
    """Our preset for larger models: many prompts or labels, a few states of each.

    The kind and the form of the adapter are those that measured best on small models; the numbers are a start, not measured.
    """
    adapter = AdapterConfig(max_fraction=max_fraction, guidance_range=guidance_range)
    train = TrainConfig(steps=5000, batch_size=32, learning_rate=1e-3, mixed_precision="bf16")
    return Preset(adapter, train, trajectories=2000, keep_steps=8)


PRESETS: dict[str, Preset] = {
    "small": Preset(
        trajectories=1600, keep_steps=6
    ),  # more trajectories, about as many states: measured better on both digits teachers
    "dit": _large(0.02, (1.0, 6.0)),
    "sd15": _large(0.02),
    "sd21": _large(0.02),
    "sdxl": _large(0.02),
    "paper-dit": _paper(256, (1.0, 6.0), 4000),
    "paper-sd21": _paper(320, TEXT_RANGE, 500),
    "paper-sdxl": _paper(320, TEXT_RANGE, 500),
}


def find_preset(name: str | None) -> Preset:
    """The default settings for None. Raises: ValueError naming the presets that there are."""
    if name is None:
        return Preset()
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; found {name!r}")
    return PRESETS[name]
