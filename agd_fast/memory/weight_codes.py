"""Weights as integers and scales: int8 with a scale per output channel, and NF4.

A weight is packed once and unpacked at every use, so unpacking takes only a few passes over memory, by ops that any device has.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int8", "nf4"]

NF4_BLOCK = 64
# quantiles of the normal distribution in [−1, 1] (QLoRA, arXiv 2305.14314, appendix E)
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def pack_weight(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [out, ...].

    int8: symmetric; codes of the weight's shape; scales [out, 1, ...] in bfloat16 (float16 for a float16 weight), absmax / 127
    rounded up, so that w ≈ codes · scales to within half a scale. nf4: blocks of 64 in memory order, the last padded with zeros;
    codes uint8 [blocks · 32], element 2i in the high half; scales float32 [blocks], the absmax.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _pack_int8(exact, weight.dtype) if kind == "int8" else _pack_nf4(exact)


def unpack_weight(codes: Tensor, scales: Tensor, kind: Kind, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """The weight [*size] that codes and scales stand for."""
    if kind == "int8":
        return codes * scales.to(dtype)
    pairs = _pairs(dtype, codes.device)
    values = pairs.index_select(0, codes.int()).view(-1, NF4_BLOCK)  # [blocks, 64]
    return values.mul_(scales[:, None]).flatten()[: size.numel()].view(size)


def _pack_int8(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scales = exact.abs().flatten(1).amax(dim=1) / 127
    narrow = scales.to(torch.float16 if dtype is torch.float16 else torch.bfloat16)
    up = torch.nextafter(narrow, torch.full_like(narrow, torch.inf))
    narrow = torch.where(narrow.to(scales.dtype) < scales, up, narrow).reshape(-1, *[1] * (exact.ndim - 1))
    codes = (exact / narrow.to(exact.dtype)).round_().nan_to_num_(0.0)  # 0/0 in a channel of zeros
    return codes.to(torch.int8), narrow


def _pack_nf4(exact: Tensor) -> tuple[Tensor, Tensor]:
    flat = exact.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    scales = blocks.abs().amax(dim=1)  # [blocks]
    levels = torch.tensor(NF4_LEVELS, dtype=exact.dtype, device=exact.device)
    middles = (levels[1:] + levels[:-1]) / 2
    indices = torch.bucketize((blocks / scales[:, None]).nan_to_num_(0.0), middles, out_int32=True).to(torch.uint8).flatten()
    return indices[::2] << 4 | indices[1::2], scales.float()


@lru_cache(maxsize=8)
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two levels that each byte stands for: [256, 2]."""
    levels = torch.tensor(NF4_LEVELS, device=device).to(dtype)
    return torch.cartesian_prod(levels, levels)
