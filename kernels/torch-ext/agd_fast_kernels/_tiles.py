"""What the matrix products share: the order of tiles, the loop over K, the tensors and configurations of a launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILE = 256
IN_FLOAT32 = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}  # spills no registers


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a program's tile: down GROUP_M rows before the next column, for concurrent programs to share L2."""
    group = program // (GROUP_M * tiles_n)
    within = program % (GROUP_M * tiles_n)
    rows = min(tiles_m - group * GROUP_M, GROUP_M)
    return group * GROUP_M + within % rows, within // rows


@triton.jit
def added(acc, a, b):
    """acc + a·b. In float32 a block's products are summed before they meet acc: in one long sum the last ones lose digits.
    Triton fuses acc + a·b into one long sum, but not acc − (−a)·b."""
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def product(x, x_rows, w, w_rows, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x·wᵀ in float32, rows of length K: BLOCK_M at x + x_rows, BLOCK_N at w + w_rows. 32-bit offsets take half the registers."""
    k = tl.arange(0, BLOCK_K)
    x_offsets, w_offsets = x_rows[:, None] + k[None, :], w_rows[None, :] + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        a = tl.load(x + x_offsets, mask=inside[None, :], other=0.0)
        b = tl.load(w + w_offsets, mask=inside[:, None], other=0.0)
        acc = added(acc, a, b)
        x += BLOCK_K
        w += BLOCK_K
    return acc


def rows_of(tensor: Tensor) -> Tensor:
    """[B, ..., C] → [B, T, C] with contiguous channels."""
    return packed(tensor.reshape(len(tensor), math.prod(tensor.shape[1:-1]), tensor.shape[-1]))


def joined(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each [B, T, C] → [1, B·T, C], so that a tile may span several samples; all unchanged if one would need a copy."""
    if any(tensor is not None and not tensor.is_contiguous() for tensor in tensors):
        return tensors
    return tuple(None if tensor is None else tensor.view(1, -1, tensor.shape[-1]) for tensor in tensors)


def packed(tensor: Tensor) -> Tensor:
    """The tensor with a contiguous last dimension and a tile's rows within 2³¹ elements; copied only if it is not so already."""
    side_by_side = tensor.stride(-1) == 1 or tensor.shape[-1] < 2
    near = tensor.ndim < 2 or tensor.stride(-2) < 2**31 // MAX_TILE
    return tensor if side_by_side and near else tensor.contiguous()


def per_sample(values: Tensor | None) -> int:
    """The stride from one sample's row to the next: 0 where all share one row, [C] or [1, C]."""
    return 0 if values is None or values.ndim == 1 or len(values) == 1 else values.stride(0)


def per_number(values: Tensor) -> int:
    """The stride from one sample's number to the next, [B]: 0 where all share one, [1]."""
    return 0 if len(values) == 1 else values.stride(0)


def chosen(
    op: str, configs: Sequence[Mapping[str, int]], config: Mapping[str, int] | None, dtype: torch.dtype, **full: int
) -> dict[str, int]:
    """The configuration of a launch, the first by default; in float32, which no tensor core multiplies exactly, at most `full`.

    Raises: ValueError for a dtype that the products do not support.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: expected float16, bfloat16 or float32, found {dtype}")
    found = dict(configs[0] if config is None else config)
    return found if dtype != torch.float32 else {name: min(value, full.get(name, value)) for name, value in found.items()}
