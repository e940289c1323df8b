"""`ada_group_norm` of channels-last images: each program takes some places of several whole groups.

Two kernels here too: the first gives each piece's mean and squared deviations, the second combines them and normalises.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import packed, per_sample

WIDE, MOST = 128, 32  # most channels and groups of a program; more channels if a single group has more
PROGRAMS = 512  # of the first kernel, several per multiprocessor
SUMMED, NORMED = 2, 4  # blocks of elements in a tile of each kernel: enough loads in flight to hide their latency


@triton.jit
def ada_group_norm_channels_last_sums_kernel(
    x, partial, x_b, groups, channels, places, piece, pieces, blocks,
    SIZE: tl.constexpr, MANY: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """partial [B·groups, pieces, 2]: the mean of `piece` places of a group, and the sum of their squared deviations from it; MANY
    groups of SIZE channels at a time. x: [B, places, channels]."""
    part = tl.program_id(0) // blocks % pieces
    sample = (tl.program_id(0) // (blocks * pieces)).to(tl.int64)
    start, first_group = part * piece, tl.program_id(0) % blocks * MANY
    end = tl.minimum(start + piece, places)
    row, channel = tl.arange(0, PLACES), tl.arange(0, CHANNELS)
    there = (channel < MANY * SIZE) & (first_group * SIZE + channel < channels)
    elements = x + sample * x_b + first_group * SIZE + channel

    means = tl.zeros((PLACES, CHANNELS), tl.float32)  # over every PLACES-th place, by Welford's formula
    deviations = tl.zeros((PLACES, CHANNELS), tl.float32)
    count = 0.0
    for first in range(start, end, PLACES):
        place = first + row
        inside = (place < end)[:, None] & there[None, :]
        values = tl.load(elements[None, :] + (place.to(tl.int64) * channels)[:, None], mask=inside, other=0.0).to(tl.float32)
        count += 1.0
        apart = tl.where(inside, values - means, 0.0)
        means += apart * (1.0 / count)
        deviations += apart * (values - means)

    counts = tl.maximum((end - start - row + PLACES - 1) // PLACES, 0).to(tl.float32)[:, None]
    all_places = (end - start).to(tl.float32)
    of_channel = tl.sum(means * counts, 0) / all_places
    apart = means - of_channel[None, :]
    squares = tl.sum(deviations + apart * apart * counts, 0)

    group = tl.arange(0, GROUPS)
    own = (channel // SIZE == group[:, None]) & there[None, :]
    mean = tl.sum(tl.where(own, of_channel[None, :], 0.0), 1) / SIZE
    apart = of_channel[None, :] - mean[:, None]
    squares = tl.sum(tl.where(own, squares[None, :] + apart * apart * all_places, 0.0), 1)
    found = partial + ((sample * groups + first_group + group) * pieces + part) * 2
    written = (group < MANY) & (first_group + group < groups)
    tl.store(found, mean, mask=written)
    tl.store(found + 1, squares, mask=written)


@triton.jit
def ada_group_norm_channels_last_fwd_kernel(
    x, gamma, beta, partial, out,
    x_b, gamma_b, beta_b, groups, channels, places, piece, pieces, tiles, blocks, eps,
    SILU: tl.constexpr, SIZE: tl.constexpr, MANY: tl.constexpr, GROUPS: tl.constexpr,
    PIECES: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """A tile [PLACES, CHANNELS] of MANY groups of out [B, places, channels]; arithmetic in float32."""
    sample = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    first_group = tl.program_id(0) % blocks * MANY

    group, part = tl.arange(0, GROUPS), tl.arange(0, PIECES)
    known = ((group < MANY) & (first_group + group < groups))[:, None] & (part < pieces)[None, :]
    found = partial + ((sample * groups + first_group + group)[:, None] * pieces + part[None, :]) * 2
    means = tl.load(found, mask=known, other=0.0)
    deviations = tl.load(found + 1, mask=known, other=0.0)
    counts = tl.where(part < pieces, tl.minimum(places - part * piece, piece), 0).to(tl.float32)[None, :]
    mean = tl.sum(means * counts, 1) / places
    apart = means - mean[:, None]
    scale = tl.rsqrt((tl.sum(deviations, 1) / SIZE + tl.sum(apart * apart * counts, 1)) / places + eps)

    channel = tl.arange(0, CHANNELS)
    own = channel[None, :] // SIZE == group[:, None]
    mean = tl.sum(tl.where(own, mean[:, None], 0.0), 0)  # [CHANNELS] from here on
    scale = tl.sum(tl.where(own, scale[:, None], 0.0), 0)
    there = (channel < MANY * SIZE) & (first_group * SIZE + channel < channels)
    channel += first_group * SIZE
    if gamma is not None:
        scale *= tl.load(gamma + sample * gamma_b + channel, mask=there, other=0.0).to(tl.float32)

    place = (tl.program_id(0) // blocks % tiles).to(tl.int64) * PLACES + tl.arange(0, PLACES)
    inside = (place < places)[:, None] & there[None, :]
    offsets = (place * channels)[:, None] + channel[None, :]
    normed = tl.load(x + sample * x_b + offsets, mask=inside, other=0.0).to(tl.float32)
    normed = (normed - mean[None, :]) * scale[None, :]
    if beta is not None:
        normed += tl.load(beta + sample * beta_b + channel, mask=there, other=0.0).to(tl.float32)[None, :]
    if SILU:
        normed = normed * tl.sigmoid(normed)
    tl.store(out + sample * places * channels + offsets, normed.to(out.dtype.element_ty), mask=inside)


def normed_channels_last(
    x: Tensor,
    groups: int,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    silu: bool,
    pieces: int,
    BLOCK: int,
    num_warps: int,
) -> Tensor:
    """x: [B, C, ...], channels last → like x. pieces: the most that a group is split into."""
    out = torch.empty_like(x)
    gamma, beta = (None if tensor is None else packed(tensor) for tensor in (gamma, beta))
    B, channels, places = len(x), x.shape[1], x[0, 0].numel()
    size = channels // groups
    many = _groups_of_a_program(groups, size)
    blocks, wide = triton.cdiv(groups, many), triton.next_power_of_2(many * size)
    tile = {"SIZE": size, "MANY": many, "GROUPS": triton.next_power_of_2(many), "CHANNELS": wide, "num_warps": num_warps}
    summed, normed = (max(1, count * BLOCK // wide) for count in (SUMMED, NORMED))  # places of a tile
    pieces = min(pieces, triton.cdiv(PROGRAMS, B * blocks))
    piece = triton.cdiv(triton.cdiv(places, pieces), summed) * summed
    pieces, tiles = triton.cdiv(places, piece), triton.cdiv(places, normed)
    partial = torch.empty(B * groups, pieces, 2, dtype=torch.float32, device=x.device)
    ada_group_norm_channels_last_sums_kernel[(B * pieces * blocks,)](
        x, partial, x.stride(0), groups, channels, places, piece, pieces, blocks, PLACES=summed, **tile
    )
    ada_group_norm_channels_last_fwd_kernel[(B * tiles * blocks,)](
        x, gamma, beta, partial, out,
        x.stride(0), per_sample(gamma), per_sample(beta), groups, channels, places, piece, pieces, tiles, blocks, eps,
        SILU=silu, PIECES=triton.next_power_of_2(pieces), PLACES=normed, **tile,
    )  # fmt: skip
    return out


def _groups_of_a_program(groups: int, size: int) -> int:
    """How many groups, if possible a multiple of 16 channels: a program's reads at each place are then aligned for the card."""
    most, aligned = min(MOST, max(1, WIDE // size)), 16 // math.gcd(size, 16)
    return min(groups, most // aligned * aligned or most)
