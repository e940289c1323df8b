"""Runs checks at the same time, each in its own process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agd_fast.environment import environment
from agd_fast.files import write_json
from nfe_speed import commit


def all_right(checks: Sequence[Callable[[], dict[str, Any]]], processes: int, path: Path | None) -> bool:
    """Whether every check's row is `ok`. path: the JSON that the rows so far are written to."""
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for one in as_completed([pool.submit(check) for check in checks]):
            rows.append(one.result())
            print(rows[-1], flush=True)
            if path:
                complete = len(rows) == len(checks)
                write_json(path, {"environment": environment(), "commit": commit(), "complete": complete, "rows": rows})
    return all(row["ok"] for row in rows)
