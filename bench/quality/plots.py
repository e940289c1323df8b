"""The panels for a teacher: guidance explained and Fréchet distance of its arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from agd_fast.files import replacing
from agd_fast.reporting.pictures import COLOURS, NAMES, plt  # chooses the Agg backend

Curve = Mapping[float, float]  # x → y
CFG_STYLE: dict[str, Any] = {"color": COLOURS["cfg"], "lw": 5, "alpha": 0.4, "solid_capstyle": "round"}  # good arms lie on it
FULL_STYLE: dict[str, Any] = {"color": "#444444", "ls": "--", "marker": "", "lw": 1.4}
ARM_STYLES: list[dict[str, Any]] = [
    {"color": "#2f6fde", "marker": "o"},
    {"color": "#2a9d62", "marker": "s"},
    {"color": "#8e4ec6", "marker": "^"},
    {"color": "#c8385a", "marker": "D"},
    {"color": "#1b9aaa", "marker": "P"},
]
ARMS = len(ARM_STYLES) - 1  # most arms in a panel; the last style is for the curve against NFE
LOWEST = -0.25  # lower values of explained are cut off: a failed arm must not flatten the others


@dataclass
class Panels:
    """What is drawn: label → curve. Full fine-tune and CFG are drawn in their own style under those names."""

    by_scale: dict[str, Curve] = field(default_factory=dict)
    by_time: dict[str, Curve] = field(default_factory=dict)
    frechet: dict[str, Curve] = field(default_factory=dict)
    by_nfe: dict[str, Curve] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)  # Fréchet distances that have no ω


def save_panels(path: Path, panels: Panels, title: str, full: str) -> None:
    """Two panels of the explained share, one of Fréchet against ω, and one against NFE if there are curves for it.

    full: the label of the full fine-tune.
    """
    count = 4 if panels.by_nfe else 3
    figure, axes = plt.subplots(1, count, figsize=(4.6 * count, 4.6), dpi=110)
    names = [*panels.by_scale, *panels.frechet, *panels.by_nfe]
    arms = [name for name in dict.fromkeys(names) if name not in (full, NAMES["cfg"], NAMES["unguided"])]
    styles = {name: ARM_STYLES[index % len(ARM_STYLES)] for index, name in enumerate(arms)}
    styles[full] = FULL_STYLE
    styles |= {NAMES["cfg"]: CFG_STYLE, NAMES["unguided"]: {"color": COLOURS["unguided"], "marker": "v"}}
    _explained(axes[0], panels.by_scale, styles, "guidance scale ω")
    _explained(axes[1], panels.by_time, styles, "timestep t (sampling runs left to right)")
    axes[1].invert_xaxis()
    _frechet(axes[2], panels.frechet, styles, "guidance scale ω", panels.levels)
    if panels.by_nfe:
        _frechet(axes[3], panels.by_nfe, styles, "NFE (passes of the denoiser an image)", {})
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=12)
    bottom = 0.02 + 0.05 * -(-len(handles) // 4)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=min(4, len(handles)), frameon=False)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)


def _lines(axis: plt.Axes, curves: Mapping[str, Curve], styles: Mapping[str, dict]) -> None:
    for name, curve in curves.items():
        x, y = zip(*sorted(curve.items()), strict=True)
        axis.plot(x, y, label=name, **{"ms": 4.5, "lw": 1.4, **styles[name]})
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _explained(axis: plt.Axes, curves: Mapping[str, Curve], styles: Mapping[str, dict], xlabel: str) -> None:
    _lines(axis, curves, styles)
    axis.axhline(1.0, **CFG_STYLE, label=NAMES["cfg"])
    lowest = min((value for curve in curves.values() for value in curve.values()), default=0.0)
    bottom = max(LOWEST, np.floor(10 * lowest - 0.2) / 10)
    axis.set(xlabel=xlabel, ylabel="guidance explained", ylim=(bottom, 1.03))


def _frechet(
    axis: plt.Axes, curves: Mapping[str, Curve], styles: Mapping[str, dict], xlabel: str, levels: Mapping[str, float]
) -> None:
    _lines(axis, curves, styles)
    for (name, level), dashes in zip(levels.items(), ("--", ":"), strict=False):
        axis.axhline(level, color=COLOURS["unguided"], ls=dashes, lw=1.4, label=name)
    axis.set(xlabel=xlabel, ylabel="Fréchet distance (lower is better)", yscale="log")
    low, high = axis.get_ylim()
    ticks = [tick for tick in nice_ticks(low, high) if low <= tick <= high]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)


def nice_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis at 1, 2 and 5, finer where it spans less than a decade."""
    factors = (1, 2, 5) if high / low > 8 else (1, 1.5, 2, 3, 4, 5, 6, 8) if high / low > 2 else np.arange(1, 10, 0.5)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [float(f"{factor * 10.0**power:.3g}") for power in powers for factor in factors]
