"""report.json, report.html, grid.png and curve.png of one evaluation."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from torch import Tensor

from agd_fast.evaluation import Evaluation
from agd_fast.evaluation.bars import Bar
from agd_fast.files import write_json, write_text
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
    template = resources.files("agd_fast.reporting").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = (
        Environment(autoescape=True)
        .from_string(template)
        .render(
            headline=headline(result),
            result=result,
            tables=tables,
            seconds=dict(seconds or {}),
            pictures={name: _inline(directory / name) for name in ("grid.png", "curve.png")},
        )
    )
    write_text(directory / "report.html", page)
    write_json(directory / "report.json", report)
    return report


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
