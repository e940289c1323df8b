"""The first half of a feed-forward block with its activation in the product; for geglu, a column's value and gate in one tile."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import IN_FLOAT32, added, chosen, joined, packed, per_sample, product, rows_of, tile_of
from .shapes import require

ACTIVATIONS = ("geglu", "gelu", "gelu_tanh")
# BLOCK_N: columns of the weight; for geglu half of them are values and half gates
CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4},
    {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, "num_warps": 4, "num_stages": 4},
)


@triton.jit
def gelu(z, BY_TANH: tl.constexpr):
    if BY_TANH:  # (1 + tanh(u))/2 = sigmoid(2u), which neither overflows nor cancels
        return z / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    return 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activated_linear_fwd_kernel(
    x, weight, bias, out,
    x_b, x_t, weight_n, bias_b,
    T, N, C, tiles_m, tiles_t, tiles_n,
    GATED: tl.constexpr, BY_TANH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A tile of out [B, T, N]; its tokens are of one sample. GATED: the weight's next N rows are the gates'."""
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    sample = (m // tiles_t).to(tl.int64)
    first, tokens = m % tiles_t * BLOCK_M, tl.arange(0, BLOCK_M)
    left, columns = n * BLOCK_N, tl.arange(0, BLOCK_N)
    x += sample * x_b + first.to(tl.int64) * x_t
    x_rows = tl.minimum(tokens, T - 1 - first) * x_t
    weight += left.to(tl.int64) * weight_n
    weight_rows = tl.minimum(columns, N - 1 - left) * weight_n
    if GATED:
        k = tl.arange(0, BLOCK_K)
        gates = weight + tl.cast(N, tl.int64) * weight_n
        x_offsets, weight_offsets = x_rows[:, None] + k[None, :], weight_rows[None, :] + k[:, None]
        z, g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, C, BLOCK_K):
            inside = k < C - start
            a = tl.load(x + x_offsets, mask=inside[None, :], other=0.0)
            z = added(z, a, tl.load(weight + weight_offsets, mask=inside[:, None], other=0.0))
            g = added(g, a, tl.load(gates + weight_offsets, mask=inside[:, None], other=0.0))
            x += BLOCK_K
            weight += BLOCK_K
            gates += BLOCK_K
    else:
        z = product(x, x_rows, weight, weight_rows, C, BLOCK_M, BLOCK_N, BLOCK_K)
    if bias is not None:
        bias += sample * bias_b + left
        z += tl.load(bias + columns, mask=columns < N - left, other=0.0).to(tl.float32)[None, :]
        if GATED:
            g += tl.load(bias + N + columns, mask=columns < N - left, other=0.0).to(tl.float32)[None, :]
    z = z * gelu(g, BY_TANH) if GATED else gelu(z, BY_TANH)
    written = (tokens < T - first)[:, None] & (columns < N - left)[None, :]
    out += (sample * T + first) * N + left
    tl.store(out + (tokens * N)[:, None] + columns[None, :], z.to(out.dtype.element_ty), mask=written)


def activated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "geglu", *, config: Mapping[str, int] | None = None
) -> Tensor:
    """z = x·weightᵀ + bias; gelu(z) [B, ..., N], or for "geglu" z's first half times the gelu of its second [B, ..., N/2].

    x: [B, ..., C]; weight: [N, C]; bias: [N] or [B, N] or None.
    Raises: ValueError naming the argument whose shape, dtype or device is another; for an unknown activation, an odd N for geglu.
    """
    require("activated_linear", x=x, weight=weight, bias=bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activated_linear: activation must be one of {', '.join(ACTIVATIONS)}; found {activation!r}")
    gated = activation == "geglu"
    if gated and len(weight) % 2:
        raise ValueError(f"activated_linear: weight must have an even number of rows for geglu, found {len(weight)}")
    launch = chosen("activated_linear", CONFIGS, config, x.dtype, **IN_FLOAT32)
    launch["BLOCK_N"] //= 2 if gated else 1
    N = len(weight) // (2 if gated else 1)
    out = x.new_empty(*x.shape[:-1], N)
    rows, weight, bias = rows_of(x), packed(weight), None if bias is None else packed(bias)
    if per_sample(bias) == 0:
        (rows,) = joined(rows)
    B, T, C = rows.shape
    tiles_t = triton.cdiv(T, launch["BLOCK_M"])
    tiles_n = triton.cdiv(N, launch["BLOCK_N"])
    if out.numel():
        activated_linear_fwd_kernel[(B * tiles_t * tiles_n,)](
            rows, weight, bias, out,
            rows.stride(0), rows.stride(1), weight.stride(0), per_sample(bias),
            T, N, C, B * tiles_t, tiles_t, tiles_n,
            GATED=gated, BY_TANH=activation == "gelu_tanh", **launch,
        )  # fmt: skip
    return out
