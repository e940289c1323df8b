"""Rows in a file that is rewritten whenever there are new ones: a killed process leaves the rows so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agd_fast.files import read_json, write_json
from speed.measure import Row


class Kept:
    """path: None keeps nothing. about: gives what is written beside the rows; called once, with the first of them.

    The rows of an earlier run are replaced only once the new ones have as many rounds, or are complete.
    """

    def __init__(self, path: Path | None, about: Callable[[], dict[str, Any]]) -> None:
        self.path, self.about = path, cache(about)
        self.before = rounds(read_json(path).get("rows", ())) if path is not None and path.exists() else 0

    def __call__(self, rows: Sequence[Row], complete: bool = False) -> None:
        """complete: whether nothing is left to be measured."""
        if self.path is not None and (complete or rounds(rows) >= self.before):
            write_json(self.path, {**self.about(), "complete": complete, "rows": list(rows)})


def rounds(rows: Sequence[Row]) -> int:
    """The number of rounds of all rows together."""
    return sum(row["seconds"]["rounds"] for row in rows if row.get("seconds"))
