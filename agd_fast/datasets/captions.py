"""Captions to collect a text model's guided trajectories from."""

from __future__ import annotations

from pathlib import Path

CAPTIONS_FILE = Path(__file__).parent / "assets" / "captions.txt"


def captions() -> list[str]:
    """Some 500 captions of 3 to about 45 words, in no order, written for this package and under its licence: no data set's.

    The paper takes 500 captions of COCO, one trajectory each (arXiv 2503.07274); these vary in style as well.
    """
    return CAPTIONS_FILE.read_text(encoding="utf-8").splitlines()
