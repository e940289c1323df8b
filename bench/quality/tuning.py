"""Copies of a teacher trained further on changed images: the bases that an adapter meets when it is moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from agd_fast import Teacher
from agd_fast.files import read_tensors, write_tensors
from quality.data import to_pixels
from quality.teachers import BenchTeacher
from quality.training import Recipe, train_denoiser

Shift = Callable[[Tensor], Tensor]  # images in [−1, 1] [N, C, H, W] → others of that shape
SEED = 0


def upside_down(images: Tensor) -> Tensor:
    return images.flip(-2)


def faded(images: Tensor) -> Tensor:
    return images / 2


class TableConditions(nn.Module):
    """The conditions of classes in the distilled table, in place of the conditioner that the base was trained with."""

    def __init__(self, bench: BenchTeacher) -> None:
        super().__init__()
        self.bench, self.classes = bench, int(bench.row_labels.max()) + 1

    def forward(self, labels: Tensor, dropped: Tensor) -> dict[str, Tensor]:
        """Classes [B] and which of them to drop [B] → the denoiser's arguments; captions in a random template."""
        templates = torch.randint(len(self.bench.row_labels) // self.classes, labels.shape, device=labels.device)
        rows = (labels + self.classes * templates).cpu()  # the table is made template by template
        found = {name: value[rows].to(labels.device) for name, value in self.bench.table.items()}
        null = self.bench.teacher.null(found)
        return {n: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), null[n], value) for n, value in found.items()}


class LowRank(nn.Module):
    """W + B·A with A [rank, in], B [out, rank]: a LoRA (arXiv 2106.09685); B starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(rank, weight.shape[1]).to(weight) / weight.shape[1] ** 0.5)
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def tuned_teacher(bench: BenchTeacher, file: Path, shift: Shift, steps: int, rank: int | None = None) -> Teacher:
    """A copy of the teacher trained on shifted images, in full or by a LoRA that is merged; its weights are kept in `file`."""
    assert bench.data is not None
    teacher = bench.teacher
    data = replace(bench.data, images=shift(to_pixels(bench.data.images)))
    denoiser = copy.deepcopy(teacher.denoiser)
    if not file.is_file():
        rate = 5e-4 if rank is None else 2e-3
        recipe = Recipe({}, batch=128, steps=steps, learning_rate=rate, ema_decay=0.98, minutes=60, warmup=min(30, steps))
        denoiser.requires_grad_(rank is None)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            linears = [module for module in denoiser.modules() if isinstance(module, nn.Linear)] if rank else []
            for linear in linears:
                parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank or 0))
            checkpoint = file.with_suffix(".checkpoint")
            train_denoiser(denoiser, TableConditions(bench), teacher.scheduler, data, recipe, checkpoint, teacher.device)
            for linear in linears:
                parametrize.remove_parametrizations(linear, "weight")  # leaves W + B·A
        checkpoint.unlink(missing_ok=True)
        write_tensors(file, denoiser.state_dict())
    denoiser.load_state_dict(read_tensors(file)[0])
    return replace(teacher, denoiser=denoiser, name=f"{teacher.name}-{file.stem}")
