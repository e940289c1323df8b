"""Layer norm with per-sample γ and β: a row stays in registers between its statistics and its result."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, packed, per_sample, rows_of
from .shapes import require

# num_warps is for a tile of TILE elements, one row or several short ones; a longer row gets proportionally more.
CONFIGS: tuple[dict[str, int], ...] = (
    {"TILE": 2048, "num_warps": 4},
    {"TILE": 2048, "num_warps": 2},
    {"TILE": 4096, "num_warps": 4},
)


@triton.jit
def place(tokens, ROWS: tl.constexpr):
    """(sample, its ROWS tokens) of this program; each sample has `tokens` of them."""
    blocks = tl.cdiv(tokens, ROWS)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    return sample, (tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def one_row(values, here, inside):
    """A sample's row as [1, BLOCK] float32."""
    return tl.load(values + here, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def normalised(x, inside, C, eps):
    """[ROWS, BLOCK] float32, 0 where not inside → (x − mean)/√(var + ε) of each row."""
    mean = tl.sum(x, axis=1) / C
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)  # E[x²] − mean² would lose the digits of a large mean
    variance = tl.sum(centred * centred, axis=1) / C
    return centred * tl.rsqrt(variance + eps)[:, None]


@triton.jit
def modulated(x, gamma, beta, gamma_here, beta_here, inside, C, eps):
    """[ROWS, BLOCK] float32 → its norm, times a sample's γ, plus its β; None for 1 and 0."""
    normed = normalised(x, inside, C, eps)
    if gamma is not None:
        normed *= one_row(gamma, gamma_here, inside)
    if beta is not None:
        normed += one_row(beta, beta_here, inside)
    return normed


@triton.jit
def ada_layer_norm_fwd_kernel(
    x, gamma, beta, out, x_b, x_t, gamma_b, beta_b, T, C, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """ROWS rows of out [B, T, C], of one sample; arithmetic in float32."""
    sample, tokens = place(T, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    mask = (tokens < T)[:, None] & inside[None, :]
    rows = tl.load(x + sample * x_b + (tokens * x_t)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    normed = modulated(rows, gamma, beta, sample * gamma_b + columns, sample * beta_b + columns, inside, C, eps)
    there = ((sample * T + tokens) * C)[:, None] + columns[None, :]
    tl.store(out + there, normed.to(out.dtype.element_ty), mask=mask)


def row_tiles(launch: Mapping[str, int], B: int, T: int, C: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid for T whole rows of C in each of B samples, and the kernel's arguments by a launch's configuration."""
    block = triton.next_power_of_2(C)
    rows = max(1, min(launch["TILE"] // block, triton.next_power_of_2(T)))
    longer = max(1, block // launch["TILE"])
    warps = min(
        launch["num_warps"] * longer, max(8, block // 1024), 32
    )  # more than 8 warps cost more than they gain until a row needs them
    return (B * triton.cdiv(T, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": warps}


def ada_layer_norm_fwd(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float = 1e-5, *, config: Mapping[str, int] | None = None
) -> Tensor:
    """(x − mean)/√(var + ε)·γ + β over the last dimension.

    x: [B, ..., C]; gamma, beta: [B or 1, C], or None for 1 and 0 → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("ada_layer_norm", x=x, gamma=gamma, beta=beta)
    launch = chosen("ada_layer_norm", CONFIGS, config, x.dtype)
    out = x.new_empty(x.shape)
    if out.numel():
        rows = rows_of(x)
        gamma, beta = (None if tensor is None else packed(tensor) for tensor in (gamma, beta))
        grid, tiles = row_tiles(launch, *rows.shape)
        ada_layer_norm_fwd_kernel[grid](
            rows, gamma, beta, out, *rows.stride()[:2], per_sample(gamma), per_sample(beta), *rows.shape[1:], eps, **tiles
        )
    return out
