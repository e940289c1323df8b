"""The images that teachers are trained on, and the real ones that samples are compared with."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from agd_fast.datasets import digits_images

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = ("a photo of a {}", "a drawing of a {}", "the digit {}", "a handwritten {}", "a picture of the {}")
PHOTO_TEMPLATES = ("a photo of a {}", "a snapshot of a {}", "the {}", "a small {}", "a picture of the {}")
COMPARED = 10_000  # real images of each set whose features are compared: as many as precision and recall can handle


@dataclass(frozen=True)
class ImageData:
    """Labelled images [N, C, S, S], uint8 or float in [−1, 1], and facts about them.

    name: e.g. "digits", "cifar10". labels: [N], indices into `class_names`.
    test_images, test_labels: never trained on; empty where all images are trained on.
    real: two disjoint sets of real images; their distance is the lowest that samples can be expected to reach.
    templates: captions of a class, with `{}` for its name; the last one is kept from distillation.
    mirrored: whether a mirrored image is as realistic as the original.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    test_images: Tensor
    test_labels: Tensor
    real: tuple[Tensor, Tensor]
    templates: tuple[str, ...]
    mirrored: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """C, H, W"""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


def to_pixels(images: Tensor) -> Tensor:
    """uint8 in 0..255, or float as it is → float32 in [−1, 1]"""
    return images.float().div(127.5).sub(1) if images.dtype == torch.uint8 else images


def mirror_at_random(images: Tensor) -> Tensor:
    """Images [N, C, H, W], each mirrored left to right with probability 1/2."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def load_data(name_or_path: str | Path, limit: int | None = None, size: int | None = None) -> ImageData:
    """'digits', or the path of the training half of a set of JPEG files in npz; the test half lies beside it.

    limit: take only that many images of each half, for smoke runs. size: shrink photographs to that side, for a CPU.
    Raises: FileNotFoundError, ValueError naming what was expected and found.
    """
    if str(name_or_path) != "digits":
        return _photos(Path(name_or_path), limit, size)
    if size is not None:
        raise ValueError(f"expected photographs to shrink, found 'digits' with size={size}")
    return _digits(limit)


def _digits(limit: int | None) -> ImageData:
    images, labels = digits_images()
    images, labels = images[:limit], labels[:limit]
    rows = torch.arange(len(labels)).numpy()
    halves = train_test_split(rows, test_size=0.5, stratify=labels.numpy(), random_state=0)
    first, second = (images[torch.from_numpy(half)] for half in halves)
    return ImageData(
        "digits", images, labels, DIGIT_NAMES, images[:0], labels[:0], (first, second), DIGIT_TEMPLATES, mirrored=False
    )


def _photos(path: Path, limit: int | None, size: int | None) -> ImageData:
    if "train" not in path.name:
        raise ValueError(f"expected 'digits' or the path of an npz with 'train' in its name, found {path}")
    train, test = (_read(file) for file in (path, path.with_name(path.name.replace("train", "test"))))
    if train["classes"].tolist() != test["classes"].tolist():
        raise ValueError(f"expected the same classes in both files, found {train['classes']} and {test['classes']}")
    images, labels = _decode(train, limit)
    test_images, test_labels = _decode(test, limit)
    name = path.name.split("_train")[0]
    if size is not None:
        images, test_images, name = _shrunk(images, size), _shrunk(test_images, size), f"{name}-{size}"
    real = (to_pixels(images[:COMPARED]), to_pixels(test_images[:COMPARED]))
    names = tuple(str(word) for word in train["classes"])
    return ImageData(name, images, labels, names, test_images, test_labels, real, PHOTO_TEMPLATES, mirrored=True)


def _read(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    expected = ("jpeg", "offsets", "labels", "classes")
    if not path.is_file():
        raise FileNotFoundError(f"expected an npz of {', '.join(expected)} at {path}, found none")
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected an npz of {', '.join(expected)} at {path}; it cannot be read ({error})") from error
    if missing := set(expected) - set(found):
        raise ValueError(f"expected the arrays {', '.join(expected)} in {path}; missing {', '.join(sorted(missing))}")
    count = len(found["labels"])
    if len(found["offsets"]) != count + 1 or found["offsets"][-1] != len(found["jpeg"]):
        raise ValueError(
            f"expected {count + 1} offsets that end at {len(found['jpeg'])} in {path}, "
            f"found {len(found['offsets'])} that end at {found['offsets'][-1]}"
        )
    return found


def _shrunk(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, C, S, S] → [N, C, size, size], each pixel the mean of those that it replaces"""
    side = images.shape[-1]
    if size < 1 or side % size:
        raise ValueError(f"expected a size that divides the images' side of {side}, found {size}")
    parts = (F.avg_pool2d(part.float(), side // size) for part in images.split(1000))
    return torch.cat([part.round().to(torch.uint8) for part in parts])


def _decode(arrays: Mapping[str, np.ndarray[Any, Any]], limit: int | None) -> tuple[Tensor, Tensor]:
    """uint8 images [N, 3, S, S] and labels [N]"""
    labels = torch.from_numpy(arrays["labels"][:limit].astype(np.int64))
    jpeg, offsets = arrays["jpeg"], arrays["offsets"]
    files = (jpeg[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(labels)))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels
