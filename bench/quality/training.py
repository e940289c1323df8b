"""Trains a teacher within a time limit: bf16 where it is fast, resumable, keeping the EMA of the weights."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from agd_fast.distillation.checkpoint import load_checkpoint, save_checkpoint
from agd_fast.files import fingerprint
from quality.data import ImageData, mirror_at_random, to_pixels

SAVE_EVERY = 60.0  # seconds between checkpoints
SHOW_EVERY = 20  # steps between readings of the loss: each one waits for the device


@dataclass(frozen=True)
class Recipe:
    """A denoiser's config and how it is trained: to `steps` or for `minutes`, whichever comes first.

    decay: the last share of the run, over which the learning rate falls to zero.
    label_noise: share of labels replaced by random ones, as wrong captions are in web-scale data.
    bf16: autocast where the device has fast bf16.
    """

    config: Mapping[str, Any]
    batch: int
    steps: int
    learning_rate: float
    ema_decay: float
    minutes: float = 8.0
    decay: float = 0.25
    warmup: int = 100
    dropout: float = 0.1
    label_noise: float = 0.0
    bf16: bool = True
    seed: int = 0


class Clock:
    """Seconds spent on a run, over all its resumptions, and the share of the run that is done."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.step = 0
        self.earlier = 0.0
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.earlier + time.monotonic() - self.start

    @property
    def progress(self) -> float:
        return max(self.step / self.recipe.steps, self.seconds / (60 * self.recipe.minutes))

    def rate(self, step: int) -> float:
        """The learning rate's factor: a linear warm-up, then constant, then linearly to zero."""
        recipe = self.recipe
        left = (1 - self.progress) / recipe.decay if recipe.decay else 1.0
        return max(0.0, min(1.0, (step + 1) / recipe.warmup, left))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.earlier, self.start = state["step"], state["seconds"], time.monotonic()


def train_denoiser(
    denoiser: nn.Module,
    conditioner: nn.Module,
    scheduler: DDIMScheduler,
    data: ImageData,
    recipe: Recipe,
    checkpoint: Path,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Train both modules in place to the EMA of their weights; returns steps, seconds and the mean of the last losses.

    conditioner: classes [B], dropped [B] → the denoiser's arguments. checkpoint: written every minute, resumed from if it exists.
    Both stay in eval mode: in train mode each block of a DiT would drop labels on its own.
    """
    device = torch.device(device)
    modules = nn.ModuleDict({"denoiser": denoiser, "conditioner": conditioner}).eval().to(device)
    parameters = list(modules.parameters())
    average = EMAModel(parameters, decay=recipe.ema_decay, foreach=True)
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=device.type == "cuda"
    )
    clock = Clock(recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate)
    torch.manual_seed(recipe.seed)
    images, labels = data.images.to(device), data.labels.to(device)
    saved = {"model": modules, "average": nn.ParameterList(average.shadow_params)}
    run = {**asdict(recipe), "data": fingerprint({"images": data.images, "labels": data.labels})}
    others = {"schedule": schedule, "clock": clock}
    if checkpoint.is_file():
        load_checkpoint(checkpoint, run, saved, optimizer, others)
    average.optimization_step = clock.step
    recent: deque[Tensor] = deque(maxlen=SHOW_EVERY)
    last_save = clock.seconds
    with tqdm(total=recipe.steps, initial=clock.step, desc=checkpoint.parent.name) as bar:
        while clock.progress < 1:
            loss = denoising_loss(denoiser, conditioner, scheduler, images, labels, data, recipe)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            clock.step += 1
            schedule.step()
            average.step(parameters)
            recent.append(loss.detach())
            if clock.step % SHOW_EVERY == 0:
                bar.set_postfix(loss=f"{_mean(recent):.4f}", minutes=f"{clock.seconds / 60:.1f}/{recipe.minutes:g}")
            bar.update()
            if clock.seconds - last_save > SAVE_EVERY:
                save_checkpoint(checkpoint, clock.step, run, saved, optimizer, others)
                last_save = clock.seconds
    average.copy_to(parameters)
    return {"steps": clock.step, "seconds": clock.seconds, "loss": _mean(recent) if recent else None}


def has_fast_bf16(device: torch.device) -> bool:
    """A GPU, or a CPU with instructions for it."""
    return device.type == "cuda" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))


def _mean(losses: Iterable[Tensor]) -> float:
    return torch.stack(list(losses)).mean().item()


def denoising_loss(
    denoiser: nn.Module,
    conditioner: nn.Module,
    scheduler: DDIMScheduler,
    images: Tensor,
    labels: Tensor,
    data: ImageData,
    recipe: Recipe,
) -> Tensor:
    """Mean squared error of the velocity on a batch drawn at random, all of it on the images' device."""
    device, batch = images.device, (recipe.batch,)
    rows = torch.randint(len(images), batch, device=device)
    x0, y = to_pixels(images[rows]), labels[rows]
    if data.mirrored:
        x0 = mirror_at_random(x0)
    wrong = torch.rand(batch, device=device) < recipe.label_noise
    y = torch.where(wrong, torch.randint(len(data.class_names), batch, device=device), y)
    t = torch.randint(scheduler.config.num_train_timesteps, batch, device=device)
    noise = torch.randn_like(x0)
    x = scheduler.add_noise(x0, noise, t)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16 and has_fast_bf16(device)):
        conditions = conditioner(y, torch.rand(batch, device=device) < recipe.dropout)
        prediction = denoiser(x, timestep=t, **conditions, return_dict=False)[0]
    return F.mse_loss(prediction.float(), scheduler.get_velocity(x0, noise, t))
