"""scikit-learn's digits (1,797 real 8×8 images of ten classes), with a teacher and a classifier that ship with the package.

Both are trained by `bench/train_digits.py`, reproducibly from its seed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import Tensor, nn

from agd_fast.files import read_tensors
from agd_fast.teacher import Teacher

ASSETS = Path(__file__).parent / "assets"
TEACHER_DIR, CLASSIFIER_FILE = ASSETS / "digits_teacher", ASSETS / "digits_classifier.safetensors"


class DigitsClassifier(nn.Module):
    """A small convolutional network. Its penultimate layer gives the features for Fréchet distance and precision/recall.

    The features end in a tanh. Unbounded features grow with the classifier's confidence, and the distance would then measure
    confidence more than likeness.
    """

    num_features = 48

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128, self.num_features),
            nn.Tanh(),
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(self.num_features, 10))

    def features(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8], clamped to [−1, 1] → [N, 48]"""
        return self.body(images.clamp(-1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[N, 1, 8, 8], clamped to [−1, 1] → logits [N, 10]"""
        return self.head(self.features(images))


def digits_teacher() -> Teacher:
    """A class-conditional DiTTransformer2DModel with its DDIM scheduler, in float32 on the CPU."""
    denoiser = DiTTransformer2DModel.from_pretrained(TEACHER_DIR).float()
    scheduler = DDIMScheduler.from_pretrained(TEACHER_DIR)
    return Teacher(denoiser, scheduler, name="agd_fast.datasets.digits_teacher")


def digits_classifier() -> DigitsClassifier:
    classifier = DigitsClassifier()
    tensors, _ = read_tensors(CLASSIFIER_FILE)
    classifier.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return classifier.eval().requires_grad_(False)


def digits_images() -> tuple[Tensor, Tensor]:
    """All real images [1797, 1, 8, 8] in [−1, 1] and their labels [1797].

    Raises: ImportError naming the extra to install if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn; expected pip install 'agd-fast[demo]'") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(data.target).long()
