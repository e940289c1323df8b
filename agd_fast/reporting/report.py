"""report.json, report.html, grid.png and curve.png of one evaluation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from agd_fast.evaluation import Evaluation
from agd_fast.evaluation.bars import Bar
from agd_fast.files import without_nan, write_json
from agd_fast.reporting.page import EXPLAINED_NOTE, Figure, write_page
from agd_fast.reporting.pictures import save_curve, save_grid
from agd_fast.reporting.tables import (
    ARM_HEADER,
    BAR_HEADER,
    SCALE_HEADER,
    arm_rows,
    bar_rows,
    headline,
    scale_rows,
)

NOTE = f"{EXPLAINED_NOTE} A Fréchet distance below CFG's above CFG's best ω can also mean weaker guidance; read the two together."


def write_report(
    directory: str | os.PathLike[str],
    result: Evaluation,
    grid: Mapping[str, Tensor],
    *,
    columns: Sequence[str] = (),
    bars: Sequence[Bar] = (),
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Write all four files and return what report.json holds."""
    directory = Path(directory)
    report = {**result.to_dict(), "seconds": dict(seconds or {}), "bars": [bar.to_dict() for bar in bars]}
    save_grid(directory / "grid.png", grid, columns)
    save_curve(directory / "curve.png", result)
    tables = [
        (f"At ω = {result.guidance_scale:g}, where CFG is best", ARM_HEADER, arm_rows(result)),
        ("By guidance scale", SCALE_HEADER, scale_rows(result)),
    ]
    if bars:
        tables.append(("Bars", BAR_HEADER, bar_rows(bars)))
    write_page(
        directory / "report.html",
        headline=headline(result),
        about=f"{result.samples} samples a row, {result.steps} steps, every row from the same noise.",
        first=Figure(directory / "grid.png", "Samples without guidance, with CFG and with AGD from the same noise"),
        tables=tables,
        last=Figure(
            directory / "curve.png",
            "Fréchet distance and explained guidance against the guidance scale",
            "Fidelity against the guidance scale",
        ),
        note=NOTE,
        seconds=seconds or {},
        environment=result.environment,
    )
    write_json(directory / "report.json", without_nan(report))
    return report
