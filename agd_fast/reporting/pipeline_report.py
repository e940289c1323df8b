"""report.json, report.html and grid.png of one pipeline's evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from agd_fast.evaluation.pictures import Pictures, Way
from agd_fast.evaluation.pipeline import PipelineEvaluation
from agd_fast.files import replacing, without_nan, write_json
from agd_fast.reporting.page import EXPLAINED_NOTE, Figure, write_page
from agd_fast.reporting.pipeline_tables import pipeline_about, pipeline_headline, pipeline_tables
from agd_fast.reporting.tables import NAMES

ROWS, SMALLEST, LARGEST = 8, 96, 256  # pictures per way, and bounds on their longer edge in pixels
LABEL, MARGIN = 180, 6
NOTE = (
    f"{EXPLAINED_NOTE} RMSE (of values in [0, 1]), PSNR, SSIM and LPIPS are those of pictures of 8 bits to CFG's from the same "
    "noise. Pictures far from CFG's may still be good ones: CLIP score and the Fréchet distance to real pictures tell. A Fréchet "
    "distance of fewer pictures than features is mostly bias."
)


def write_pipeline_report(result: PipelineEvaluation, pictures: Pictures, ways: Sequence[Way], numbers: Sequence[int]) -> None:
    """numbers: those of the pictures that were compared; the first ones are drawn."""
    directory = result.directory
    with replacing(directory / "grid.png") as partial:
        draw_grid(pictures, ways, numbers[:ROWS]).save(partial, "PNG")
    write_page(
        directory / "report.html",
        headline=pipeline_headline(result),
        about=f"{pipeline_about(result)}.",
        first=Figure(directory / "grid.png", "Pictures without guidance, with CFG and with AGD from the same noise"),
        tables=pipeline_tables(result),
        note=NOTE,
        seconds=result.seconds,
        environment=result.environment,
    )
    write_json(directory / "report.json", without_nan(result.to_dict()))


def draw_grid(pictures: Pictures, ways: Sequence[Way], numbers: Sequence[int]) -> Image.Image:
    """One row per input, one column per way."""
    tiles = [[_tile(Image.open(pictures.path(way, number))) for way in ways] for number in numbers]
    width, height = (max(sizes) for sizes in zip(*(tile.size for line in tiles for tile in line), strict=True))
    top = 24
    grid = Image.new("RGB", (LABEL + len(ways) * (width + MARGIN), top + len(numbers) * (height + MARGIN)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for column, way in enumerate(ways):
        draw.text((LABEL + column * (width + MARGIN) + width / 2, top / 2), _title(way), "black", font, anchor="mm")
    for row, (number, line) in enumerate(zip(numbers, tiles, strict=True)):
        y = top + row * (height + MARGIN)
        lines = _wrapped(pictures.describe(number), draw, font, LABEL - 2 * MARGIN, height // 16)
        draw.multiline_text((LABEL - MARGIN, y + height / 2), lines, "black", font, anchor="rm", align="right")
        for column, tile in enumerate(line):
            grid.paste(tile, (LABEL + column * (width + MARGIN), y))
    return grid


def _tile(picture: Image.Image) -> Image.Image:
    """The picture at a visible size: a large one shrunk, a small one enlarged by a whole factor."""
    edge = max(picture.size)
    if edge < SMALLEST:
        factor = -(-SMALLEST // edge)
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    small = picture.copy()
    small.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return small


def _title(way: Way) -> str:
    return NAMES[way.arm] if way.arm == "unguided" else f"{NAMES[way.arm]} {way.scale:g}"


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int
) -> str:
    """The words in lines of at most `width`, as many as there is room for."""
    found = [""]
    for word in text.split():
        longer = f"{found[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            found[-1] = longer
        else:
            found.append(word)
    shown = [line for line in found if line][: max(lines, 1)]
    return "\n".join(shown) + ("…" if len(shown) < len([line for line in found if line]) else "")
