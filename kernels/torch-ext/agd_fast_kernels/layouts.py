"""How an image lies in memory: contiguous, or with its channels side by side, which PyTorch calls channels_last."""

from __future__ import annotations

from torch import Tensor


def channels_last(image: Tensor) -> bool:
    """Whether the channels of [B, C, ...] lie side by side and place behind place; not of what is contiguous, too."""
    return image.ndim > 2 and not image.is_contiguous() and image.movedim(1, -1).is_contiguous()


def laid_like(image: Tensor, like: Tensor) -> Tensor:
    """The same [B, C, ...], its channels side by side where those of `like` are, else contiguous."""
    return image.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(like) else image.contiguous()
