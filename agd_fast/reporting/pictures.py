"""The sample grid and the curves. Needs matplotlib (`agd-fast[demo]`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

from agd_fast.evaluation import Evaluation
from agd_fast.files import replacing
from agd_fast.reporting.tables import NAMES

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter

COLOURS = {"unguided": "#8a8f98", "cfg": "#d9822b", "agd": "#2f6fde"}


def save_grid(path: str | os.PathLike[str], rows: Mapping[str, Tensor], columns: Sequence[str] = (), title: str = "") -> None:
    """A labelled grid, upscaled without smoothing: row label → samples [N, 1 or 3, H, W] in [−1, 1]."""
    count = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), count, figsize=(1.0 * count + 1.6, 1.06 * len(rows) + 0.7), squeeze=False, dpi=110)
    for (label, images), line in zip(rows.items(), axes, strict=True):
        for column, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(False)
            if column < len(images):
                pixels = (images[column].float().clamp(-1, 1).add(1).div(2).permute(1, 2, 0)).cpu().numpy()
                axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", labelpad=12, fontsize=11)
    for axis, name in zip(axes[0], columns, strict=False):
        axis.set_title(name, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12)
    figure.tight_layout(pad=0.5, w_pad=0.25, h_pad=0.25)
    _save(figure, path)


def save_curve(path: str | os.PathLike[str], result: Evaluation) -> None:
    """Fréchet distance against ω for the three arms, and the explained share of guidance."""
    omegas = [float(omega) for omega in result.by_scale]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), dpi=110)
    for arm in ("cfg", "agd"):
        values = [getattr(scale, arm).frechet_distance for scale in result.by_scale.values()]
        left.plot(omegas, values, "o-", color=COLOURS[arm], label=f"{NAMES[arm]}, NFE {result.arms[arm].nfe:g}")
    left.axhline(result.arms["unguided"].frechet_distance, color=COLOURS["unguided"], ls="--", label="unguided")
    left.set(xlabel="guidance scale ω", ylabel="Fréchet distance (lower is better)", yscale="log")
    left.yaxis.set_major_formatter(ScalarFormatter())
    left.yaxis.set_minor_formatter(ScalarFormatter())
    left.tick_params(axis="y", which="minor", labelsize=7)
    left.legend(frameon=False)
    right.plot(omegas, [scale.guidance_explained for scale in result.by_scale.values()], "o-", color=COLOURS["agd"])
    right.axhline(1.0, color=COLOURS["cfg"], ls="--")
    right.set(xlabel="guidance scale ω", ylabel="guidance explained", ylim=(min(0.0, *right.get_ylim()), 1.05))
    right.annotate("CFG", (omegas[0], 1.0), xytext=(0, 4), textcoords="offset points", color=COLOURS["cfg"])
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    _save(figure, path)


def _save(figure: plt.Figure, path: str | os.PathLike[str]) -> None:
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)
