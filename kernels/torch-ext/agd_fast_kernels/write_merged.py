"""Many weights of different sizes, merged with their low-rank terms in one launch: out = base + up·down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import added, chosen

CONFIGS: tuple[dict[str, int], ...] = ({"BLOCK_C": 32, "BLOCK_K": 64, "num_warps": 4},)


@triton.jit
def write_merged_kernel(
    pointers, shapes, tiles,
    DTYPE: tl.constexpr, OUT_K: tl.constexpr, BASE_K: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of one out [C, K]. pointers [weights, 4]: out, base, up, down; shapes [weights, 7]: C, K, r, strides of rows;
    tiles [programs, 3]: the weight,
    the first row and column."""
    tile = tiles + tl.program_id(0) * 3
    weight = tl.load(tile).to(tl.int64)
    own, shape = pointers + weight * 4, shapes + weight * 7
    C, K, r = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2)
    numbers: tl.constexpr = tl.pointer_type(DTYPE)
    c = tl.load(tile + 1) + tl.arange(0, BLOCK_C)
    k = tl.load(tile + 2) + tl.arange(0, BLOCK_K)
    up = tl.load(own + 2).to(numbers) + (c.to(tl.int64) * tl.load(shape + 5))[:, None]
    down = tl.load(own + 3).to(numbers) + k[None, :]
    term = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    for start in range(0, r, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        u = tl.load(up + ranks[None, :], mask=(c < C)[:, None] & (ranks < r)[None, :], other=0.0)
        of_down = down + (ranks * tl.load(shape + 6))[:, None]
        term = added(term, u, tl.load(of_down, mask=(ranks < r)[:, None] & (k < K)[None, :], other=0.0))
    inside = (c < C)[:, None] & (k < K)[None, :]
    base = tl.load(own + 1).to(numbers) + (c.to(tl.int64) * tl.load(shape + 4))[:, None] + (k * BASE_K)[None, :]
    found = tl.load(base, mask=inside, other=0.0).to(tl.float32) + term
    out = tl.load(own).to(numbers) + (c.to(tl.int64) * tl.load(shape + 3))[:, None] + (k * OUT_K)[None, :]
    tl.store(out, found.to(DTYPE), mask=inside)


def write_merged_fwd(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    tables: Sequence[Tensor] = (),
    *,
    config: Mapping[str, int] | None = None,
) -> None:
    """outs[i] ← bases[i] + ups[i]·downs[i].

    outs, bases: [C, K], whose strides along K are the same for all; ups: [C, r]; downs: [r, K]; both with contiguous rows.
    tables: what `tables_of` made for these, to be used again; a CUDA graph of the launch reads them.
    Raises: ValueError for other strides, or several dtypes or devices.
    """
    if not outs:
        return
    where, sizes, tiles = tables or tables_of(outs, bases, ups, downs, config=config)
    write_merged_kernel[(len(tiles),)](
        where, sizes, tiles,
        DTYPE=getattr(tl, str(outs[0].dtype).removeprefix("torch.")), OUT_K=outs[0].stride(1), BASE_K=bases[0].stride(1),
        BLOCK_R=16, **_launch(outs[0].dtype, config),
    )  # fmt: skip


def tables_of(
    outs: Sequence[Tensor],
    bases: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the tensors lie, what their shapes are, and which tile each program writes, on their device. Raises: as above."""
    every = list(zip(outs, bases, ups, downs, strict=True))
    steps = {(out.stride(1), base.stride(1), up.stride(1), down.stride(1)) for out, base, up, down in every}
    kinds = {(one.dtype, one.device) for each in every for one in each}
    if len(steps) > 1 or max(steps)[2:] != (1, 1) or len(kinds) > 1:
        raise ValueError(
            f"write_merged: expected one dtype, one device and the same strides for all; found {kinds}, {sorted(steps)}"
        )
    launch = _launch(outs[0].dtype, config)
    corners = [
        (index, c, k)
        for index, out in enumerate(outs)
        for c in range(0, out.shape[0], launch["BLOCK_C"])
        for k in range(0, out.shape[1], launch["BLOCK_K"])
    ]
    shapes = [(*out.shape, len(down), *(one.stride(0) for one in (out, base, up, down))) for out, base, up, down in every]
    pointers = [[one.data_ptr() for one in each] for each in every]
    device = outs[0].device
    where, sizes = (torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (pointers, shapes))
    return where, sizes, torch.tensor(corners, dtype=torch.int32, device=device)


def _launch(dtype: torch.dtype, config: Mapping[str, int] | None) -> dict[str, int]:
    return chosen("write_merged", CONFIGS, config, dtype)
