"""residual + gate·(y + P·U) in one pass: the mix of a few tokens never leaves the registers."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, packed, per_sample, rows_of
from .ada_layer_norm import one_row
from .shapes import require

# 128 channels divide most widths; U's rows are read once for all ROWS tokens of a tile.
CONFIGS: tuple[dict[str, int], ...] = (
    {"ROWS": 16, "BLOCK": 128, "num_warps": 4},
    {"ROWS": 32, "BLOCK": 128, "num_warps": 4},
)


@triton.jit
def gated_residual_fwd_kernel(
    residual, y, gate, P, U, out,
    residual_b, residual_t, y_b, y_t, gate_b, P_b, P_t, P_s, U_b, U_s, T, C, tiles_t, tiles_c,
    S: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, BLOCK] of out [B, T, C], of one sample; programs go along the channels first; arithmetic in float32."""
    row = tl.program_id(0) // tiles_c
    sample = (row // tiles_t).to(tl.int64)
    tokens = (row % tiles_t).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) % tiles_c) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    mask = (tokens < T)[:, None] & inside[None, :]
    added = tl.load(y + sample * y_b + (tokens * y_t)[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    before = residual + sample * residual_b + (tokens * residual_t)[:, None] + columns[None, :]
    total = tl.load(before, mask=mask, other=0.0).to(tl.float32)
    if P is not None:
        for s in tl.range(S, loop_unroll_factor=4):  # fully unrolled, it would hold all of U at once
            weight = tl.load(P + sample * P_b + tokens * P_t + s * P_s, mask=tokens < T, other=0.0).to(tl.float32)
            added += weight[:, None] * one_row(U, sample * U_b + s * U_s + columns, inside)
    if gate is not None:
        added *= one_row(gate, sample * gate_b + columns, inside)
    there = ((sample * T + tokens) * C)[:, None] + columns[None, :]
    tl.store(out + there, (total + added).to(out.dtype.element_ty), mask=mask)


def gated_residual_fwd(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None,
    P: Tensor | None = None,
    U: Tensor | None = None,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """residual + gate·(y + P·U).

    residual, y: [B, ..., C]; gate: [B or 1, C], or None for 1; P: [B, ..., S] with U [B, S, C], or both None → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("gated_residual", residual=residual, y=y, gate=gate, P=P, U=U)
    if (P is None) != (U is None):
        raise ValueError(f"gated_residual: expected P and U or neither, found {'U' if P is None else 'P'} alone")
    launch = chosen("gated_residual", CONFIGS, config, residual.dtype)
    out = residual.new_empty(residual.shape)
    if out.numel():
        before, added, weights = rows_of(residual), rows_of(y), None if P is None else rows_of(P)
        gate, U = (None if tensor is None else packed(tensor) for tensor in (gate, U))
        B, T, C = before.shape
        tiles_t, tiles_c = triton.cdiv(T, launch["ROWS"]), triton.cdiv(C, launch["BLOCK"])
        gated_residual_fwd_kernel[(B * tiles_t * tiles_c,)](
            before, added, gate, weights, U, out,
            *before.stride()[:2], *added.stride()[:2], per_sample(gate),
            *((0, 0, 0) if weights is None else weights.stride()), *((0, 0) if U is None else U.stride()[:2]),
            T, C, tiles_t, tiles_c, S=0 if U is None else U.shape[1], **launch,
        )  # fmt: skip
    return out
