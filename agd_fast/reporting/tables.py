"""The comparison as rows: one source for the terminal and the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, JustifyMethod
from rich.table import Table

from agd_fast.evaluation import Evaluation
from agd_fast.evaluation.bars import Bar

ARM_HEADER = ("", "NFE", "ms / image", "Fréchet", "accuracy", "precision", "recall")
SCALE_HEADER = ("ω", "Fréchet CFG", "Fréchet AGD", "accuracy CFG", "accuracy AGD", "explained", "RMSE AGD", "RMSE unguided")
BAR_HEADER = ("bar", "measured", "limit", "")
NAMES = {"unguided": "unguided", "cfg": "CFG", "agd": "AGD"}
_TITLES = {"unguided": "unguided", "cfg": "CFG (two passes)", "agd": "AGD (one pass)"}


def arm_rows(result: Evaluation) -> list[tuple[str, ...]]:
    return [
        (
            _TITLES[name],
            f"{arm.nfe:g}",
            _number(None if arm.seconds_per_image is None else arm.seconds_per_image * 1e3, ".2f"),
            f"{arm.frechet_distance:.3f}",
            _number(arm.class_accuracy, ".3f"),
            f"{arm.precision:.3f}",
            f"{arm.recall:.3f}",
        )
        for name, arm in result.arms.items()
    ]


def scale_rows(result: Evaluation) -> list[tuple[str, ...]]:
    return [
        (
            omega,
            f"{scale.cfg.frechet_distance:.3f}",
            f"{scale.agd.frechet_distance:.3f}",
            _number(scale.cfg.class_accuracy, ".3f"),
            _number(scale.agd.class_accuracy, ".3f"),
            f"{scale.guidance_explained:.3f}",
            f"{scale.rmse_to_cfg['agd']:.3f}",
            f"{scale.rmse_to_cfg['unguided']:.3f}",
        )
        for omega, scale in result.by_scale.items()
    ]


def bar_rows(bars: Sequence[Bar]) -> list[tuple[str, ...]]:
    return [
        (
            bar.name,
            f"{bar.value:.3f}",
            f"{'≤' if bar.kind == 'max' else '≥'} {bar.limit:g}",
            "cleared" if bar.cleared else "MISSED",
        )
        for bar in bars
    ]


def headline(result: Evaluation) -> str:
    adapter = result.adapter
    speed = f"; {result.speedup_over_cfg:.2f}× faster than CFG" if result.speedup_over_cfg else ""
    return (
        f"{adapter['kind']} adapter, {adapter['parameters']:,} parameters ({adapter['fraction']:.1%} of the base), "
        f"explains {result.guidance_explained:.1%} of the guidance, strength {result.guidance_strength:.2f}{speed}"
    )


def print_evaluation(result: Evaluation, bars: Sequence[Bar] = (), console: Console | None = None) -> None:
    console = console or Console()
    console.print(f"\n[bold]{headline(result)}[/bold]")
    best = f"ω = {result.guidance_scale:g} (CFG's best), {result.steps} steps, {result.samples:,} samples, same noise"
    console.print(rich_table(best, ARM_HEADER, arm_rows(result)))
    console.print(rich_table("by guidance scale", SCALE_HEADER, scale_rows(result)))
    if bars:
        console.print(rich_table("bars", BAR_HEADER, bar_rows(bars)))


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], justify: JustifyMethod = "right") -> Table:
    table = Table(title=title, title_justify="left", title_style="italic")
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else justify)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)
