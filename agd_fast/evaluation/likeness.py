"""How similar an arm's pictures are to CFG's from the same noise, and how its pictures score on their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from agd_fast.evaluation.frechet import frechet_distance
from agd_fast.evaluation.networks import Features, Networks
from agd_fast.evaluation.pictures import Pictures, Way, to_tensor

PSNR_OF_8_BITS = 58.9  # dB, of rounding to 8 bits alone: 10·log₁₀(12·255²)
SSIM_MARGIN = 5  # pixels that are mirrored around a picture
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Scores:
    """Scores of one arm's pictures; None if not asked for or not defined, such as CFG's likeness to itself.

    rmse, psnr, ssim, lpips, frechet_to_cfg: against CFG's pictures from the same noise. rmse is of values in [0, 1], psnr in dB;
        psnr, ssim and lpips are means over pictures.
    clip: score of the pictures with their prompts.
    frechet_to_real: distance to a folder of real pictures.
    """

    rmse: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    frechet_to_cfg: float | None = None
    clip: float | None = None
    frechet_to_real: float | None = None


@dataclass(frozen=True)
class Scorer:
    """Scores the pictures of `numbers`.

    prompts: of the inputs, which the pictures take in turn; only CLIP needs them. real: features of real pictures [M, D].
    device: where the networks are.
    """

    pictures: Pictures
    numbers: Sequence[int]
    networks: Networks
    prompts: Sequence[str]
    real: Tensor | None
    device: torch.device
    _own: dict[Way, tuple[float | None, Tensor | None]] = field(default_factory=dict, init=False)

    @torch.no_grad()
    def score(self, way: Way, target: Way) -> Scores:
        """The scores of `way` against `target`, which is CFG."""
        (clip, features), (_, others) = self._alone(way), self._alone(target)
        to_real = _distance(self.real, features)
        scores = Scores(clip=clip, frechet_to_real=to_real)
        if way == target:
            return scores
        return replace(scores, **self._paired(way, target), frechet_to_cfg=_distance(others, features))

    def _paired(self, way: Way, target: Way) -> dict[str, float | None]:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure  # as in `frechet`

        found: dict[str, list[Tensor]] = {name: [] for name in ("psnr", "ssim", "lpips")}
        squared: list[Tensor] = []
        for a, b in zip(self.pictures.read(way, self.numbers), self.pictures.read(target, self.numbers), strict=True):
            squared.append((a - b).square().mean(dim=(1, 2, 3)))
            found["psnr"].append(peak_signal_noise_ratio(a, b, 1.0, reduction="none", dim=(1, 2, 3)).clamp(max=PSNR_OF_8_BITS))
            if min(a.shape[2:]) > SSIM_MARGIN:
                similar = structural_similarity_index_measure(a, b, data_range=1.0, reduction="none")
                found["ssim"].append(torch.as_tensor(similar))
            if self.networks.lpips is not None:
                found["lpips"].append(self.networks.lpips(a.to(self.device), b.to(self.device)).cpu())
        rmse = torch.cat(squared).mean().sqrt().item()
        return {"rmse": rmse, **{name: _mean(parts) for name, parts in found.items()}}

    def _alone(self, way: Way) -> tuple[float | None, Tensor | None]:
        """CLIP score, and features [N, D], of one way's pictures."""
        if way not in self._own:
            clip, features, seen = [], [], 0
            for part in self.pictures.read(way, self.numbers):
                numbers = self.numbers[seen : seen + len(part)]
                seen += len(part)
                if self.networks.clip is not None:
                    texts = [self.prompts[number % len(self.prompts)] for number in numbers]
                    clip.append(self.networks.clip(part.to(self.device), texts).cpu())
                if self.networks.features is not None:
                    features.append(self.networks.features(part.to(self.device)).flatten(1).cpu())
            self._own[way] = _mean(clip), torch.cat(features) if features else None
        return self._own[way]


def black_in(pictures: Pictures, ways: Sequence[Way], count: int) -> dict[str, list[int]]:
    """By way, the numbers of its pictures that are black all over, from a safety checker or from values that are not finite."""
    found = {}
    for way in ways:
        maxima = torch.cat([part.amax(dim=(1, 2, 3)) for part in pictures.read(way, range(count))])
        found[way.name] = torch.nonzero(maxima == 0).flatten().tolist()
    return {name: numbers for name, numbers in found.items() if numbers}


@torch.no_grad()
def features_of_folder(folder: Path, features: Features, size: tuple[int, int], device: torch.device) -> Tensor:
    """[M, D] of all pictures in a folder and its subfolders, cropped and resized to `size` (width, height)."""
    return torch.cat([features(part.to(device)).flatten(1).cpu() for part in _resized(pictures_in(folder), size)])


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders. Raises: FileNotFoundError if there are fewer than two."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(found) < 2:
        raise FileNotFoundError(f"expected a folder with real pictures ({', '.join(SUFFIXES)}), found {len(found)} in {folder}")
    return found


def _resized(paths: Sequence[Path], size: tuple[int, int], batch_size: int = 32) -> Iterator[Tensor]:
    for start in range(0, len(paths), batch_size):
        images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths[start : start + batch_size]]
        yield torch.stack([to_tensor(ImageOps.fit(image, size, Image.Resampling.LANCZOS)) for image in images])


def _distance(one: Tensor | None, other: Tensor | None) -> float | None:
    """None if it is not defined: for fewer than two pictures, once black ones are left out."""
    return None if one is None or other is None or min(len(one), len(other)) < 2 else frechet_distance(one, other)


def _mean(parts: list[Tensor]) -> float | None:
    return torch.cat(parts).float().mean().item() if parts else None
