"""How an image lies in memory: contiguous, or with the channels of a place side by side, which PyTorch calls channels_last."""

from __future__ import annotations

from torch import Tensor


def channels_last(image: Tensor) -> bool:
    """Whether [B, C, ...] is dense with the channels of each place side by side; False for what is contiguous as well."""
    return image.ndim > 2 and not image.is_contiguous() and image.movedim(1, -1).is_contiguous()


def laid_like(image: Tensor, like: Tensor) -> Tensor:
    """The same [B, C, ...], channels last if `like` is, else contiguous."""
    return image.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last(like) else image.contiguous()
