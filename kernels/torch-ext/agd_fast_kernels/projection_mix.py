"""A block's output projection, an adapter's mix and the residual in one product: the mix is a last step of the loop over K."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import IN_FLOAT32, chosen, joined, packed, per_sample, product, rows_of, tile_of
from .shapes import require

CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4},
)


@triton.jit
def projection_mix_fwd_kernel(
    attended, weight, bias, P, U, residual, gate, out,
    attended_b, attended_t, weight_n, bias_b, P_b, P_t, U_b, U_s, residual_b, residual_t, gate_b,
    T, C, K, S, tiles_m, tiles_t, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of out [B, T, C]; its tokens are of one sample. Rounded once."""
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    sample = (m // tiles_t).to(tl.int64)
    first, tokens = m % tiles_t * BLOCK_M, tl.arange(0, BLOCK_M)
    left, columns = n * BLOCK_N, tl.arange(0, BLOCK_N)
    inside, near = columns < C - left, tl.minimum(tokens, T - 1 - first)
    attended += sample * attended_b + first.to(tl.int64) * attended_t
    weight += left.to(tl.int64) * weight_n
    weight_rows = tl.minimum(columns, C - 1 - left) * weight_n
    acc = product(attended, near * attended_t, weight, weight_rows, K, BLOCK_M, BLOCK_N, BLOCK_K)
    if P is not None:
        P += sample * P_b + first.to(tl.int64) * P_t
        U += sample * U_b + left
        for start in range(0, S, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            p = tl.load(P + (near * P_t)[:, None] + s[None, :], mask=(s < S)[None, :], other=0.0)
            there = U + (s.to(tl.int64) * U_s)[:, None] + columns[None, :]
            u = tl.load(there, mask=(s < S)[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(p, u, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + sample * bias_b + left + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        acc *= tl.load(gate + sample * gate_b + left + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    written = (tokens < T - first)[:, None] & inside[None, :]
    if residual is not None:
        residual += sample * residual_b + first.to(tl.int64) * residual_t + left
        acc += tl.load(residual + (tokens * residual_t)[:, None] + columns[None, :], mask=written, other=0.0).to(tl.float32)
    out += (sample * T + first) * C + left
    tl.store(out + (tokens * C)[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=written)


def projection_mix_fwd(
    attended: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    P: Tensor | None,
    U: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None = None,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """residual + gate·(attended·weightᵀ + bias + P·U).

    attended: [B, ..., K]; weight: [C, K]; bias: [C] or [B, C] or None; P: [B, ..., S] with U [B, S, C], or both None;
    residual: [B, ..., C] or None; gate: [B or 1, C] or None → [B, ..., C].
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("projection_mix", attended=attended, weight=weight, bias=bias, P=P, U=U, residual=residual, gate=gate)
    if (P is None) != (U is None):
        raise ValueError(f"projection_mix: expected P and U or neither, found {'U' if P is None else 'P'} alone")
    launch = chosen("projection_mix", CONFIGS, config, attended.dtype, **IN_FLOAT32)
    (C, K), S = weight.shape, 0 if U is None else U.shape[1]
    out = attended.new_empty(*attended.shape[:-1], C)
    rows, weight = rows_of(attended), packed(weight)
    mixed, residual = (None if tensor is None else rows_of(tensor) for tensor in (P, residual))
    U, bias, gate = (None if tensor is None else packed(tensor) for tensor in (U, bias, gate))
    if P is None and per_sample(bias) == per_sample(gate) == 0:
        rows, residual = joined(rows, residual)
    strides = [(0, 0) if tensor is None else tensor.stride()[:2] for tensor in (mixed, U, residual)]
    B, T = rows.shape[:2]
    tiles_t = triton.cdiv(T, launch["BLOCK_M"])
    tiles_n = triton.cdiv(C, launch["BLOCK_N"])
    if out.numel():
        projection_mix_fwd_kernel[(B * tiles_t * tiles_n,)](
            rows, weight, bias, mixed, U, residual, gate, out,
            *rows.stride()[:2], weight.stride(0), per_sample(bias), *strides[0], *strides[1], *strides[2], per_sample(gate),
            T, C, K, S, B * tiles_t, tiles_t, tiles_n,
            BLOCK_S=min(max(16, triton.next_power_of_2(S)), launch["BLOCK_K"]), **launch,
        )  # fmt: skip
    return out
