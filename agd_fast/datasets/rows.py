"""Reading rows of a pipeline's inputs from a file: prompts; or texts, numbers and pictures, by argument of its call."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from agd_fast.files import read_lines

PICTURES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Read a file with one prompt per line; empty lines are skipped.

    Raises: FileNotFoundError; ValueError naming a file that is not UTF-8 or holds no prompt.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected a text file with one prompt a line, or in Python a list of prompts; found no file {path}"
        )
    found = [line.strip() for line in read_lines(path) if line.strip()]
    if not found:
        raise ValueError(f"expected at least one prompt in {path}, found none")
    return found


def read_inputs(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    """Read a file with one JSON object per line, such as {"prompt": "a red cat", "image": "cat.png"}.

    Returns what `agd_fast.distill(inputs=...)` takes: {"prompt": [...], "image": [...]}. For all arguments but prompts, a text
    that ends like the name of a picture file is opened as a picture, relative to the file's folder.
    Raises: FileNotFoundError naming a file or picture; ValueError for a file that is not UTF-8, for a line that is not an object
    or has other arguments, and for a picture of more than 8 bits per channel.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file with one JSON object a line, found no file {path}")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}", path.parent))
            if rows[-1].keys() != rows[0].keys():
                raise ValueError(f"{path}, line {number}: expected {sorted(rows[0])} as before, found {sorted(rows[-1])}")
    if not rows:
        raise ValueError(f"expected at least one line in {path}, found none")
    return {name: [row[name] for row in rows] for name in rows[0]}


def _row(line: str, where: str, folder: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, found {line!r}: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {line!r}")
    return {name: value if "prompt" in name else _opened(value, where, folder) for name, value in row.items()}


def _opened(value: Any, where: str, folder: Path) -> Any:
    if isinstance(value, list):
        return [_opened(one, where, folder) for one in value]
    if not isinstance(value, str) or Path(value).suffix.lower() not in PICTURES:
        return value
    if not (folder / value).is_file():
        raise FileNotFoundError(f"{where}: found no picture {folder / value}")
    with Image.open(folder / value) as picture:
        if picture.mode.startswith(("I", "F")):  # PIL would clip its values at 255
            raise ValueError(f"{where}: expected a picture of 8 bits a channel, found mode {picture.mode} in {folder / value}")
        return ImageOps.exif_transpose(picture).convert("RGB")
