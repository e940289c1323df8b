"""Group norm with per-sample γ and β, and SiLU: a group is split among programs, and each program combines their statistics.

The first kernel gives each piece's mean and squared deviations, the second combines them by Chan's formula and normalises.
Channels-last images have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ada_group_norm_channels_last import normed_channels_last
from ._tiles import chosen, packed, per_sample
from .layouts import channels_last
from .shapes import require

CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK": 2048, "num_warps": 4},
    {"BLOCK": 4096, "num_warps": 8},
    {"BLOCK": 1024, "num_warps": 4},
)
PIECES = 64  # most pieces of a group: every program of the second kernel combines all of them


@triton.jit
def ada_group_norm_sums_kernel(x, partial, x_b, groups, size, piece, pieces, BLOCK: tl.constexpr):
    """partial [B·groups, pieces, 2]: the mean of `piece` elements of a group, and the sum of their squared deviations from it."""
    group = tl.program_id(0) // pieces
    start = (tl.program_id(0) % pieces).to(tl.int64) * piece
    elements = x + (group // groups).to(tl.int64) * x_b + (group % groups).to(tl.int64) * size
    end = tl.minimum(start + piece, size)
    mean, deviations, count = 0.0, 0.0, 0.0
    for first in range(start, end, BLOCK):
        places = first + tl.arange(0, BLOCK)
        inside = places < end
        values = tl.load(elements + places, mask=inside, other=0.0).to(tl.float32)
        here = tl.minimum(end - first, BLOCK).to(tl.float32)
        its_mean = tl.sum(values) / here
        centred = tl.where(inside, values - its_mean, 0.0)
        apart, count = its_mean - mean, count + here
        deviations += tl.sum(centred * centred) + apart * apart * here * (count - here) / count
        mean += apart * here / count
    tl.store(partial + tl.program_id(0).to(tl.int64) * 2, mean)
    tl.store(partial + tl.program_id(0).to(tl.int64) * 2 + 1, deviations)


@triton.jit
def ada_group_norm_fwd_kernel(
    x, gamma, beta, partial, out,
    x_b, gamma_b, beta_b, groups, channels, places, size, piece, pieces, tiles_c, tiles_p, eps,
    SILU: tl.constexpr, PIECES: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A tile [CHANNELS, PLACES] of a group of out [B, groups·channels, places]; arithmetic in float32."""
    group = tl.program_id(0) // (tiles_c * tiles_p)
    tile = tl.program_id(0) % (tiles_c * tiles_p)
    sample, within = (group // groups).to(tl.int64), group % groups

    part = tl.arange(0, PIECES)
    found = partial + (group.to(tl.int64) * pieces + part) * 2
    means = tl.load(found, mask=part < pieces, other=0.0)
    deviations = tl.load(found + 1, mask=part < pieces, other=0.0)
    counts = tl.where(part < pieces, tl.minimum(size - part.to(tl.int64) * piece, piece), 0).to(tl.float32)
    mean = tl.sum(means * counts) / size
    apart = means - mean
    scale = tl.rsqrt(tl.sum(deviations + apart * apart * counts) / size + eps)

    channel = (tile // tiles_p) * CHANNELS + tl.arange(0, CHANNELS)
    place = (tile % tiles_p).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    mask = (channel < channels)[:, None] & (place < places)[None, :]
    there = within.to(tl.int64) * size + (channel.to(tl.int64) * places)[:, None] + place[None, :]
    normed = (tl.load(x + sample * x_b + there, mask=mask, other=0.0).to(tl.float32) - mean) * scale
    channel_of_all = within * channels + channel
    if gamma is not None:
        normed *= tl.load(gamma + sample * gamma_b + channel_of_all, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
    if beta is not None:
        normed += tl.load(beta + sample * beta_b + channel_of_all, mask=channel < channels, other=0.0).to(tl.float32)[:, None]
    if SILU:
        normed = normed * tl.sigmoid(normed)
    tl.store(out + sample * groups * size + there, normed.to(out.dtype.element_ty), mask=mask)


def ada_group_norm_fwd(
    x: Tensor,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float = 1e-5,
    silu: bool = False,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """act((x − mean)/√(var + ε)·γ + β), mean and var over a group's channels and all places; act is SiLU or nothing.

    x: [B, C, ...]; gamma, beta: [B or 1, C], or None for 1 and 0 → like x, channels last if x is, else contiguous.
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("ada_group_norm", x=x, gamma=gamma, beta=beta)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"ada_group_norm: groups must divide the {x.shape[1]} channels, found {groups}")
    launch = chosen("ada_group_norm", CONFIGS, config, x.dtype)
    block, warps = launch["BLOCK"], launch["num_warps"]
    if channels_last(x):
        return normed_channels_last(x, groups, gamma, beta, eps, silu, PIECES, **launch)
    out = x.new_empty(x.shape)
    if out.numel():
        x = x.contiguous()
        gamma, beta = (None if tensor is None else packed(tensor) for tensor in (gamma, beta))
        B, channels, places = len(x), x.shape[1] // groups, x[0, 0].numel()
        size = channels * places
        piece = triton.cdiv(triton.cdiv(size, PIECES), block) * block
        pieces = triton.cdiv(size, piece)
        partial = torch.empty(B * groups, pieces, 2, dtype=torch.float32, device=x.device)
        ada_group_norm_sums_kernel[(B * groups * pieces,)](
            x, partial, x.stride(0), groups, size, piece, pieces, BLOCK=block, num_warps=warps
        )
        wide = min(block, triton.next_power_of_2(places))
        tall = min(block // wide, triton.next_power_of_2(channels))
        tiles_c, tiles_p = triton.cdiv(channels, tall), triton.cdiv(places, wide)
        ada_group_norm_fwd_kernel[(B * groups * tiles_c * tiles_p,)](
            x, gamma, beta, partial, out,
            x.stride(0), per_sample(gamma), per_sample(beta),
            groups, channels, places, size, piece, pieces, tiles_c, tiles_p, eps,
            SILU=silu, PIECES=triton.next_power_of_2(pieces), CHANNELS=tall, PLACES=wide, num_warps=warps,
        )  # fmt: skip
    return out
