"""The classifier whose penultimate features Fréchet distances are measured in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from agd_fast.adapters import count_parameters
from agd_fast.datasets.digits import ASSETS
from agd_fast.demo import digits_reference
from agd_fast.environment import environment
from agd_fast.evaluation import Reference
from agd_fast.files import read_json, read_tensors, write_json, write_tensors
from quality.data import ImageData, mirror_at_random, to_pixels
from quality.training import has_fast_bf16

BATCH = 512
PADDING = 4  # most pixels that a training image is moved by


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_convolution(channels, channels), _convolution(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _convolution(inputs: int, outputs: int, *after: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), *after
    )


class PhotoClassifier(nn.Module):
    """A small residual network. Features end in a tanh, for the same reason as in agd_fast's DigitsClassifier."""

    def __init__(self, num_classes: int, width: int = 48, num_features: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(3, width),
            _convolution(width, 2 * width, nn.MaxPool2d(2)),
            _Residual(2 * width),
            _convolution(2 * width, 4 * width, nn.MaxPool2d(2)),
            _Residual(4 * width),
            _convolution(4 * width, 4 * width, nn.MaxPool2d(2)),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_features),
            nn.Tanh(),
        )
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """[N, 3, S, S], clamped to [−1, 1] → [N, 128]"""
        return self.body(images.clamp(-1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, S, S], clamped to [−1, 1] → logits [N, K]"""
        return self.head(self.features(images))


def features_of(reference: Reference, images: Tensor) -> Tensor:
    """[N, C, S, S] → [N, D], a batch at a time"""
    device = reference.images.device
    with torch.inference_mode():
        return torch.cat([reference.features(to_pixels(part.to(device))) for part in images.split(BATCH)])


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` classified correctly; images and labels on the model's device."""
    with torch.inference_mode():
        predicted = torch.cat([model(to_pixels(part)).argmax(1) for part in images.split(BATCH)])
    return (predicted == labels).double().mean().item()


def load_reference(data: ImageData, directory: Path, device: torch.device | str = "cpu") -> Reference:
    """Real images and the features to compare in: those of the shipped classifier for the digits, else of the one in `directory`.

    Raises: FileNotFoundError when the latter was never trained.
    """
    if data.name == "digits":
        return digits_reference()
    model = PhotoClassifier(len(data.class_names))
    tensors, _ = read_tensors(_file(data, directory))
    model.load_state_dict({name: value.float() if value.is_floating_point() else value for name, value in tensors.items()})
    model.eval().requires_grad_(False).to(device)
    return Reference(data.real[0].to(device), model.features, model)


def classifier_record(data: ImageData, directory: Path) -> dict[str, Any]:
    """What is known of the classifier that `load_reference` loads: its accuracy, and the number of images behind it."""
    if data.name == "digits":
        settings = read_json(ASSETS / "training.json")
        return {"name": "agd_fast.datasets.digits_classifier", "accuracy": settings["classifier_accuracy"]}
    return read_json(_file(data, directory).with_suffix(".json"))


def ensure_classifier(data: ImageData, directory: Path, device: torch.device, epochs: int) -> None:
    """Train the classifier of `data` once and keep it in `directory`; for the digits one is shipped."""
    file = _file(data, directory)
    if data.name == "digits" or file.with_suffix(".json").is_file():
        return
    start = time.perf_counter()
    model = _train(data, device, epochs)
    model.half().float()  # so that what is measured is what is saved
    accuracy = accuracy_of(model, data.test_images.to(device), data.test_labels.to(device))
    write_tensors(file, {n: value.half() if value.is_floating_point() else value for n, value in model.state_dict().items()})
    record = {
        "name": file.stem,
        "accuracy": accuracy,
        "images": len(data.test_images),
        "epochs": epochs,
        "parameters": count_parameters(model),
        "seconds": time.perf_counter() - start,
        "environment": environment(),
    }
    write_json(file.with_suffix(".json"), record)


def _file(data: ImageData, directory: Path) -> Path:
    return directory / f"{data.name}-classifier.safetensors"


def _train(data: ImageData, device: torch.device, epochs: int, seed: int = 0) -> PhotoClassifier:
    torch.manual_seed(seed)
    model = PhotoClassifier(len(data.class_names)).to(device)
    images, labels = data.images.to(device), data.labels.to(device)
    steps = epochs * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=5e-2, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in tqdm(range(epochs), desc="classifier"):
        for rows in torch.randperm(len(labels), device=device).split(BATCH):
            x = _augmented(to_pixels(images[rows]))
            with torch.autocast(device.type, torch.bfloat16, enabled=has_fast_bf16(device)):
                loss = F.cross_entropy(model(x), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _augmented(x: Tensor) -> Tensor:
    """Each image mirrored at random and moved by up to PADDING pixels. x: [B, 3, S, S]"""
    count, _, size, _ = x.shape
    x = F.pad(mirror_at_random(x), (PADDING,) * 4, mode="reflect").permute(0, 2, 3, 1)  # [B, S + 8, S + 8, 3]
    top, left = torch.randint(2 * PADDING + 1, (2, count, 1), device=x.device)
    inside = torch.arange(size, device=x.device)
    image = torch.arange(count, device=x.device)[:, None, None]
    return x[image, (top + inside)[:, :, None], (left + inside)[:, None, :]].permute(0, 3, 1, 2)
