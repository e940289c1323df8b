"""A gated residual sum and the layer norm of it: the sum is in registers when its norm needs it."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, packed, per_sample, rows_of
from .ada_layer_norm import modulated, one_row, place, row_tiles
from .shapes import require

# As in ada_layer_norm.
CONFIGS: tuple[dict[str, int], ...] = (
    {"TILE": 2048, "num_warps": 4},
    {"TILE": 2048, "num_warps": 2},
    {"TILE": 4096, "num_warps": 4},
)


@triton.jit
def residual_norm_fwd_kernel(
    residual, y, gate, gamma, beta, h, out,
    residual_b, residual_t, y_b, y_t, gate_b, gamma_b, beta_b, T, C, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of h and of out [B, T, C], of one sample; arithmetic in float32."""
    sample, tokens = place(T, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = columns < C
    mask = (tokens < T)[:, None] & inside[None, :]
    before = residual + sample * residual_b + (tokens * residual_t)[:, None] + columns[None, :]
    total = tl.load(before, mask=mask, other=0.0).to(tl.float32)
    added = tl.load(y + sample * y_b + (tokens * y_t)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        added *= one_row(gate, sample * gate_b + columns, inside)
    there = ((sample * T + tokens) * C)[:, None] + columns[None, :]
    rounded = (total + added).to(h.dtype.element_ty)
    tl.store(h + there, rounded, mask=mask)

    written = rounded.to(tl.float32)  # the norm is of the sum as written, after rounding
    normed = modulated(written, gamma, beta, sample * gamma_b + columns, sample * beta_b + columns, inside, C, eps)
    tl.store(out + there, normed.to(out.dtype.element_ty), mask=mask)


def residual_norm_fwd(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float = 1e-5,
    *,
    config: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + gate·y, and ada_layer_norm(h), [B, ..., C] both.

    residual, y: [B, ..., C]; gate, gamma, beta: [B or 1, C], or None for 1, 1 and 0.
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("residual_norm", residual=residual, y=y, gate=gate, gamma=gamma, beta=beta)
    launch = chosen("residual_norm", CONFIGS, config, residual.dtype)
    h, out = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    if h.numel():
        before, added = rows_of(residual), rows_of(y)
        gate, gamma, beta = (None if tensor is None else packed(tensor) for tensor in (gate, gamma, beta))
        grid, tiles = row_tiles(launch, *before.shape)
        residual_norm_fwd_kernel[grid](
            before, added, gate, gamma, beta, h, out,
            *before.stride()[:2], *added.stride()[:2], per_sample(gate), per_sample(gamma), per_sample(beta),
            *before.shape[1:], eps, **tiles,
        )  # fmt: skip
    return h, out
