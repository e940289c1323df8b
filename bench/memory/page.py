"""Writes what was measured into docs/memory.md, between its markers.

python -m memory.page results/distill_memory_meta.json results/gradient_error_*.json     # from bench/
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agd_fast.files import read_json, write_text
from memory.budget import MODES

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
GIB = 2**30
NAMES = {
    "sdxl-1024": "SDXL 1024²",
    "sd21-768": "SD 2.1 768²",
    "sd3-medium-1024": "SD3-medium 1024²",
    "pixart-sigma-1024": "PixArt-Σ 1024²",
    "dit-xl2-256": "DiT-XL/2 256²",
    "qwen-image": "Qwen-Image 1024²",
    "wan-1.3b": "Wan 2.1 1.3B, 81 frames of 480×832",
}
WAYS = ("eager", "checkpointing", "mincut", *MODES[1:], "blocks")


def main(counted: Path, gradients: Sequence[Path]) -> None:
    rows, found = read_json(counted)["rows"], [read_json(path) for path in gradients]
    text = PAGE.read_text(encoding="utf-8")
    sections = {
        "budget": budget_table(rows),
        "ideas": ideas_table([one for one in found if one["adapter"]["kind"] != "cross_attention"]),
        "ideas of cross-attention": ideas_table([one for one in found if one["adapter"]["kind"] == "cross_attention"]),
        "baselines": baseline_table(rows),
        "kinds": kind_table(rows),
    }
    for name, section in sections.items():
        before, rest = text.split(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{section}<!-- / -->{rest.partition('<!-- / -->')[2]}"
    write_text(PAGE, text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rows))


def find(rows: Sequence[dict[str, Any]], model: str, mode: str, adapter: str = "default") -> dict[str, Any] | None:
    return next((row for row in rows if (row["model"], row["mode"], row["adapter"]) == (model, mode, adapter)), None)


def gib(row: dict[str, Any] | None, entry: str = "saved_bytes", form: str = ".3f") -> str:
    return "–" if row is None or row[entry] is None else format(row[entry] / GIB, form)


def budget_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for model, name in NAMES.items():
        found = [find(rows, model, mode) for mode in MODES]
        if found[0] is None or found[0]["budget_bytes"] is None:
            continue
        cells.append((name, "paper", *(gib(row, "budget_bytes") for row in found)))
        cells.append(("", "counted", *(gib(row) for row in found)))
    return table(("GiB", "", *MODES), cells)


def baseline_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for model, name in NAMES.items():
        eager = find(rows, model, "eager")
        for mode in WAYS:
            row = find(rows, model, mode)
            if row is None or eager is None:
                continue
            more = "–" if row["flops"] is None or mode == "eager" else f"+{100 * (row['flops'] / eager['flops'] - 1):.0f} %"
            title = "min-cut" if mode == "mincut" else mode
            cells.append((name if mode == "eager" else "", title, gib(row), gib(row, "peak_bytes", ".2f"), more))
    return table(("", "", "kept, GiB", "in all, GiB", "FLOPs"), cells)


def kind_table(rows: Sequence[dict[str, Any]]) -> str:
    shown = [way for way in WAYS if way != "mincut"]
    cells = [(name, *(gib(find(rows, model, mode, "cross_attention")) for mode in shown)) for model, name in NAMES.items()]
    return table(("GiB", *shown), cells)


def ideas_table(gradients: Sequence[dict[str, Any]]) -> str:
    """One column of bytes, if a file has them, and three of errors per model; without bytes, only the ideas that round."""
    counted = next((found["rows"] for found in gradients if found["rows"][0]["saved_bytes"] is not None), None)
    header = ["", *(["kept, SDXL, GiB"] if counted else [])]
    for found in gradients:
        header += [f"{found['model']}: cosine", "error", "error, outliers"]
    cells = []
    for index, row in enumerate(gradients[0]["rows"]):
        same = [one["rows"][index] for one in gradients]
        if counted is None and all(one["relative_error"] < 1e-5 for one in same):
            continue
        line = [row["way"].replace("|", "\\|"), *([gib(counted[index])] if counted else [])]
        for one in same:
            errors = [one["relative_error"], one["outliers_relative_error"]]
            line += [f"{one['cosine']:.6f}", *(f"{error:.4f}" for error in errors)]
        cells.append(line)
    return table(header, cells)


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
