"""A pipeline's arms as rows, for the terminal and the page. Columns that nobody asked for are left out."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from agd_fast.evaluation.costs import Cost
from agd_fast.evaluation.likeness import Scores
from agd_fast.evaluation.pipeline import PipelineEvaluation, PipelineScale
from agd_fast.reporting.page import Table
from agd_fast.reporting.tables import NAMES, rich_table


def _score(name: str, form: str) -> Callable[[Scores], str | None]:
    return lambda scores: None if (value := getattr(scores, name)) is None else format(value, form)


_SCORES = {
    "RMSE": _score("rmse", ".4f"),
    "PSNR": _score("psnr", ".2f"),
    "SSIM": _score("ssim", ".4f"),
    "LPIPS": _score("lpips", ".4f"),
    "Fréchet to CFG": _score("frechet_to_cfg", ".4g"),
    "CLIP": _score("clip", ".2f"),
    "Fréchet to real": _score("frechet_to_real", ".4g"),
}
_COSTS: dict[str, Callable[[Cost], str | None]] = {
    "NFE": lambda cost: f"{cost.nfe:g}",
    "s / picture": lambda cost: None if cost.seconds is None else f"{cost.seconds:.4g}",
    "p20–p80": lambda cost: (
        None if cost.timing is None else f"{cost.timing.p20 / cost.batch:.4g}–{cost.timing.p80 / cost.batch:.4g}"
    ),
    "peak GiB": lambda cost: None if cost.peak_bytes is None else f"{cost.peak_bytes / 2**30:.2f}",
}


def pipeline_tables(result: PipelineEvaluation) -> list[Table]:
    """One table of scores per scale, and one of costs."""
    scores = [
        (f"Guidance scale {name}: {_explained(scale)}", *_table(scale.arms, _SCORES)) for name, scale in result.by_scale.items()
    ]
    return [*scores, ("What a picture costs", *_table(result.costs, _COSTS))]


def pipeline_headline(result: PipelineEvaluation) -> str:
    adapters = "; ".join(
        f"{one['kind']} adapter{f' of {name}' if len(result.adapters) > 1 else ''}, {one['parameters']:,} parameters "
        f"({one['fraction']:.1%} of the base)"
        for name, one in result.adapters.items()
    )
    close = ", ".join(f"{scale.closeness:.2f} at {name}" for name, scale in result.by_scale.items())
    cfg, agd = result.costs["cfg"], result.costs["agd"]
    speed = f", {result.speedup_over_cfg:.2f}× as fast" if result.speedup_over_cfg else ""
    return (
        f"{adapters}: RMSE to CFG's pictures, as a share of the unguided ones', {close}; {agd.nfe:g} evaluations a picture "
        f"instead of {cfg.nfe:g}{speed}"
    )


def pipeline_about(result: PipelineEvaluation) -> str:
    whose = ", ".join(f"{way}: {count}" for way, count in result.black.items())
    left_out = f", {result.left_out} of them left out as black ({whose})" if result.left_out else ""
    networks = "".join(f"; {metric}: {network}" for metric, network in result.networks.items())
    return (
        f"{result.pipeline}, {result.pictures} pictures an arm{left_out}, of {result.prompts} inputs; {result.steps} steps, "
        f"every arm from the same noise{networks}"
    )


def print_pipeline_evaluation(result: PipelineEvaluation, console: Console | None = None) -> None:
    console = console or Console()
    console.print(f"\n[bold]{pipeline_headline(result)}[/bold]\n{pipeline_about(result)}")
    for title, header, rows in pipeline_tables(result):
        console.print(rich_table(title, header, rows))


def _table(arms: dict, columns: dict[str, Callable[..., str | None]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one row per arm."""
    cells = {title: [column(one) for one in arms.values()] for title, column in columns.items()}
    cells = {title: found for title, found in cells.items() if any(cell is not None for cell in found)}
    rows = [[NAMES[name], *(found[index] or "" for found in cells.values())] for index, name in enumerate(arms)]
    return ["", *cells], rows


def _explained(scale: PipelineScale) -> str:
    if not scale.guidance_explained:
        return "explained guidance not measured"
    several = len(scale.guidance_explained) > 1
    return ", ".join(
        f"{value:.1%} of the guidance explained, strength {scale.guidance_strength[name]:.2f}" + (f" ({name})" if several else "")
        for name, value in scale.guidance_explained.items()
    )
