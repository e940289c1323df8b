"""Rows as a table for the terminal and as bars."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console

from agd_fast.files import replacing
from agd_fast.reporting.tables import rich_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

WIDTH = 150  # characters per line in a file
COLUMNS = (  # header, entry of a row, unit, format
    ("NFE", "nfe", 1, "g"),
    ("ms / step", "ms_per_step", 1, ".3f"),
    ("p20", "ms_per_step_p20", 1, ".3f"),
    ("p80", "ms_per_step_p80", 1, ".3f"),
    ("on device", "device_ms_per_step", 1, ".3f"),
    ("ms / image", "ms_per_image", 1, ".2f"),
    ("× unguided", "ratio_to_unguided", 1, ".3f"),
    ("× its engine", "ratio_to_unguided_engine", 1, ".3f"),
    ("CFG / this", "speedup_over_cfg", 1, ".3f"),
    ("compiled CFG / this", "speedup_over_cfg_compiled", 1, ".3f"),
    ("launches", "launches_per_step", 1, ",.0f"),
    ("GFLOP", "flops_per_step", 1e9, ",.6g"),
    ("error", "relative_error", 1, ".1e"),
    ("roofline", "roofline_ms", 1, ".2f"),
    ("peak GiB", "peak_memory_bytes", 2**30, ".2f"),
)
BARS = (  # entry of a row, its unit, the label of the axis
    ("ms_per_step", 1, "ms a step"),
    ("flops_per_step", 1e12, "TFLOP a step"),
    ("launches_per_step", 1, "launches a step"),
)
COLOURS = {"unguided": "#8a8f98", "cfg": "#d9822b", "agd": "#2f6fde"}  # by the first part of an arm's name


def print_rows(rows: Sequence[dict[str, Any]], title: str, console: Console | None = None) -> None:
    """One row per arm and batch; launches, FLOPs and the roofline are per step. Columns without any value are left out."""
    shown = [column for column in COLUMNS if any(row[column[1]] is not None for row in rows)]
    cells = [(row["arm"], str(row["batch"]), *(_cell(row[key], unit, form) for _, key, unit, form in shown)) for row in rows]
    console = console or (Console() if Console().is_terminal else Console(width=WIDTH))
    console.print(rich_table(title, ("arm", "batch", *(header for header, *_ in shown)), cells))
    for row in rows:
        if row["note"]:
            console.print(f"{row['arm']}, batch {row['batch']}: {row['note']}", markup=False)


def save_bars(path: str | os.PathLike[str], rows: Sequence[dict[str, Any]], title: str) -> None:
    """Bars by arm for each batch: times where there are any, else FLOPs and launches."""
    timed = any(row["ms_per_step"] is not None for row in rows)
    shown = [bar for bar in BARS if (bar[0] == "ms_per_step") == timed]
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    size = (6.2 * len(shown), (0.34 * len(arms) + 1.1) * len(batches))
    figure, axes = plt.subplots(len(batches), len(shown), figsize=size, squeeze=False, dpi=110)
    for batch, line in zip(batches, axes, strict=True):
        for (key, unit, label), axis in zip(shown, line, strict=True):
            found = {row["arm"]: row for row in rows if row["batch"] == batch and row[key] is not None}
            values = [found[arm][key] / unit for arm in arms if arm in found]
            names = [arm for arm in arms if arm in found]
            axis.barh(names, values, color=[COLOURS[name.partition("_")[0]] for name in names])
            ends = [found[arm][f"{key}_p80"] / unit if timed else value for arm, value in zip(names, values, strict=True)]
            if timed:
                low, high = ([abs(found[arm][f"{key}_{p}"] - found[arm][key]) for arm in names] for p in ("p20", "p80"))
                axis.errorbar(values, names, xerr=(low, high), fmt="none", ecolor="black", elinewidth=1)
            for name, value, end in zip(names, values, ends, strict=True):
                axis.annotate(f" {value:,.4g}", (end, name), va="center", fontsize=8)
            axis.margins(x=0.2)
            axis.invert_yaxis()
            axis.set(xlabel=label, title=f"batch {batch}")
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with replacing(Path(path)) as partial:
        figure.savefig(partial, format="png")
    plt.close(figure)


def _cell(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else format(value / unit, form)
