"""Captions for collecting the guided trajectories of a text model."""

from __future__ import annotations

from pathlib import Path

CAPTIONS_FILE = Path(__file__).parent / "assets" / "captions.txt"


def captions() -> list[str]:
    """Some 500 captions of 3 to about 45 words, in no order.

    They were written for this package and are under its licence; they come from no data set. The paper takes 500 captions of
    COCO, one trajectory each (arXiv 2503.07274); these captions vary in style as well.
    """
    return CAPTIONS_FILE.read_text(encoding="utf-8").splitlines()
