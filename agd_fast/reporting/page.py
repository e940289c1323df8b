"""The page of a report: pictures and tables in one HTML file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment

from agd_fast.files import write_text

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows
EXPLAINED_NOTE = (
    "Guidance explained is 1 − ‖ĝ − g‖² / ‖g‖² on held-out guided trajectories, where g = ε_cfg − ε(c) and ĝ = ε̂_agd − ε(c). "
    "Guidance strength is ⟨ĝ, g⟩ / ‖g‖²: below 1, the adapter guides more weakly than CFG does at the same scale."
)


@dataclass(frozen=True)
class Figure:
    """A PNG file and what it shows."""

    path: Path
    shows: str
    title: str = ""


def write_page(
    path: Path,
    *,
    headline: str,
    about: str,
    first: Figure,
    tables: Sequence[Table],
    note: str,
    seconds: Mapping[str, float],
    environment: Mapping[str, str],
    last: Figure | None = None,
) -> None:
    """From top to bottom: headline, about, the first figure, tables, the last figure, note, seconds by phase, environment."""
    template = resources.files("agd_fast.reporting").joinpath("report.html.jinja").read_text(encoding="utf-8")
    page = Environment(autoescape=True)
    page.filters["inline"] = _inline
    values = {"headline": headline, "about": about, "first": first, "tables": tables, "last": last, "note": note}
    write_text(path, page.from_string(template).render(**values, seconds=seconds, environment=environment))


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
