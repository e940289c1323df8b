"""Students that are not adapters: the ceiling, where every weight of the base is trained, and a changed text embedding."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from agd_fast import AdapterConfig, Teacher, TrainConfig, attach
from agd_fast.adapters import count_parameters
from agd_fast.conditioning import SmoothFeatures
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.train import batch_rows
from agd_fast.evaluation.explained import Student
from agd_fast.freezing import frozen
from agd_fast.trajectories import Trajectories

ADAPTER_RATE = 2e-2  # for the modulation that tells a fully trained base its ω
GUIDANCE_RANGE = (1.0, 6.0)


def full_finetune(teacher: Teacher, states: Trajectories, config: TrainConfig) -> tuple[Teacher, int]:
    """Every weight of a copy of the base trained (Meng et al., arXiv 2210.03142), told ω by a modulation adapter on it.

    Returns the copy, whose `predict_agd` is the student, and the number of parameters trained.
    """
    student = replace(teacher, denoiser=copy.deepcopy(teacher.denoiser))
    torch.manual_seed(config.seed or 0)
    adapter = attach(student, AdapterConfig("modulation", guidance_range=GUIDANCE_RANGE))
    weights = list(student.denoiser.parameters())
    for weight in weights:
        weight.requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": weights, "lr": config.learning_rate},
        {"params": list(adapter.parameters()), "lr": ADAPTER_RATE},
    ]
    _train(student.predict_agd, groups, states, config, teacher.device, "full fine-tune")
    return student, count_parameters(student.denoiser) + count_parameters(adapter)


class TextSharpener(nn.Module):
    """c + (ω − 1)·MLP(c, ∅, ω), token by token: after DICE (arXiv 2502.03726), which has one ω and no factor. c: [B, L, D]"""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.features = SmoothFeatures(GUIDANCE_RANGE)
        self.inner, self.outer = nn.Linear(2 * width + SmoothFeatures.width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, text: Tensor, null: Tensor, omega: Tensor) -> Tensor:
        features = self.features(omega)[:, None].expand(-1, text.shape[1], -1)  # [B, L, 2]
        moved = self.outer(F.silu(self.inner(torch.cat([text, null.expand_as(text), features], dim=-1))))
        return text + (omega - 1)[:, None, None] * moved


def text_embedding(teacher: Teacher, states: Trajectories, config: TrainConfig, fraction: float = 0.05) -> tuple[Student, int]:
    """Only the text embedding changes; the denoiser runs as it is. Returns the student and its number of parameters.

    Raises: ValueError when the teacher takes no text.
    """
    name = "encoder_hidden_states"
    if name not in teacher.null_condition:
        raise ValueError(f"a text_embedding arm expects a captioned teacher, found the conditions {teacher.spec.conditions}")
    null = teacher.null_condition[name]
    width = null.shape[-1]
    hidden = int((fraction * count_parameters(teacher.denoiser) - width) / (3 * width + SmoothFeatures.width + 1))
    torch.manual_seed(config.seed or 0)
    sharpener = TextSharpener(width, hidden).to(teacher.device)

    def student(x: Tensor, t: Tensor, conditions: Mapping[str, Tensor], omega: Tensor) -> Tensor:
        sharpened = sharpener(conditions[name], null, omega)
        return teacher.predict(x, t, {**conditions, name: sharpened})

    with frozen(teacher.denoiser):
        groups: list[dict[str, Any]] = [{"params": list(sharpener.parameters()), "lr": config.learning_rate}]
        _train(student, groups, states, config, teacher.device, "text embedding")
    return student, count_parameters(sharpener)


def _train(
    student: Student, groups: list[dict[str, Any]], states: Trajectories, config: TrainConfig, device: torch.device, name: str
) -> None:
    """Trains as agd_fast.distill trains an adapter: the same states in the same order, the same loss and schedule."""
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(config.warmup * config.steps), config.steps)
    parameters = [parameter for group in groups for parameter in group["params"]]
    for step in tqdm(range(config.steps), desc=name):
        batch = states[batch_rows(step, config.batch_size, len(states), config.seed or 0)].to(device)
        prediction = student(batch.sample, batch.timestep, batch.conditions, batch.omega)
        distillation_loss(prediction, batch.target, batch.omega, config.loss, config.weighting).backward()
        nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for parameter in parameters:
        parameter.requires_grad_(False)
