"""Pictures of the three arms from the same noise, as PNG files: those that exist are not made again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from agd_fast.files import differences, read_json, remove_partial, replacing, write_json
from agd_fast.pipelines import Arm, PipelineTeacher

PLAN_NAME, FOLDER = "plan.json", "pictures"


@dataclass(frozen=True)
class Way:
    """An arm at a guidance scale, in the family's own convention; the unguided arm's scale has no effect."""

    arm: Arm
    scale: float = 1.0

    @property
    def name(self) -> str:
        return self.arm if self.arm == "unguided" else f"{self.arm}-{self.scale:g}"


@dataclass(frozen=True)
class Pictures:
    """The pictures of one evaluation in `directory`, by way and number. Number n is of input n (starting over after the last),
    with the seed `seed` + n."""

    directory: Path
    teacher: PipelineTeacher
    steps: int
    seed: int

    def path(self, way: Way, number: int) -> Path:
        return self.directory / FOLDER / way.name / f"{number:05d}.png"

    def open(self, plan: dict[str, Any], resume: bool) -> None:
        """Go on with the pictures that exist, or start anew.

        plan: what determines the pictures except ways and numbers. Raises: ValueError when existing ones are of another plan.
        """
        folder, path = self.directory / FOLDER, self.directory / PLAN_NAME
        if not resume:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.exists():
            differing = differences(plan, read_json(path) if path.is_file() else {})
            if differing:
                raise ValueError(
                    f"{folder} holds pictures of another evaluation ({differing}); expected another output_dir, or resume=False "
                    "(--fresh), which deletes them"
                )
            for leftover in folder.iterdir():
                remove_partial(leftover)
        write_json(path, plan)

    def make(self, ways: Sequence[Way], count: int, batch_size: int, progress: bool = False) -> None:
        """Make those of `count` pictures per way that do not exist yet, batch_size at once.

        Raises: ValueError when the pipeline makes no pictures.
        """
        missing = {way: [n for n in range(count) if not self.path(way, n).is_file()] for way in ways}
        total = len(ways) * count
        done = total - sum(map(len, missing.values()))
        with tqdm(total=total, initial=done, desc="pictures", disable=not progress) as bar:
            for way, numbers in missing.items():
                for start in range(0, len(numbers), batch_size):
                    part = numbers[start : start + batch_size]
                    for number, picture in zip(part, self.generate(way, part), strict=True):
                        with replacing(self.path(way, number)) as partial:
                            picture.save(partial, "PNG")
                    bar.update(len(part))

    def generate(self, way: Way, numbers: Sequence[int]) -> list[Image.Image]:
        rows = [number % len(self.teacher) for number in numbers]
        found = self.teacher.runs.generate(rows, way.arm, way.scale, self.steps, [self.seed + number for number in numbers])
        if len(found) != len(rows):
            pipe = type(self.teacher.pipe).__name__
            raise ValueError(f"expected a pipeline that makes a picture, or a video, an input; found a {pipe} that makes none")
        return found

    def describe(self, number: int) -> str:
        """What the picture with this number is of."""
        inputs, row = self.teacher.inputs, number % len(self.teacher)
        value = inputs.get("prompt", next(iter(inputs.values())))[row]
        return str(value) if isinstance(value, str | int) else f"input {row}"

    def read(self, way: Way, numbers: Sequence[int], batch_size: int = 8) -> Iterator[Tensor]:
        """Batches [N, 3, H, W] in [0, 1], up to batch_size pictures of one size each."""
        part: list[Tensor] = []
        for number in numbers:
            picture = to_tensor(Image.open(self.path(way, number)))
            if part and (len(part) == batch_size or picture.shape != part[0].shape):
                yield torch.stack(part)
                part = []
            part.append(picture)
        if part:
            yield torch.stack(part)


def to_tensor(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]"""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float().div(255)
