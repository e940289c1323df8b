"""A low-rank term beside a block in one launch: hidden and output are read once, whether channels or tokens are contiguous."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tiles import added, chosen, packed, per_sample
from .layouts import channels_last
from .shapes import MAX_RANK, require

# Few tokens per program, so that a batch of one has enough programs: the time goes into reading
CONFIGS: tuple[dict[str, int], ...] = (
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
)


@triton.jit
def gated_lora_fwd_kernel(
    hidden, output, down, up, gates, out,
    hidden_b, hidden_t, hidden_k, output_b, output_t, output_c, down_r, up_c, gates_b, out_b, out_t, out_c,
    T, K, C, r, tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All channels of BLOCK_M tokens of a sample. hidden: [B, T, K]; output: [B, T, C]; any strides."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tokens = (tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    ranks = tl.arange(0, BLOCK_R)
    hidden_rows = hidden + sample * hidden_b + (tokens * hidden_t)[:, None]
    output_rows = output + sample * output_b + (tokens * output_t)[:, None]
    out_rows = out + sample * out_b + (tokens * out_t)[:, None]
    low = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        there = hidden_rows + (k.to(tl.int64) * hidden_k)[None, :]
        h = tl.load(there, mask=(tokens < T)[:, None] & (k < K)[None, :], other=0.0)
        there = down + (ranks.to(tl.int64) * down_r)[None, :] + k[:, None]
        w = tl.load(there, mask=(ranks < r)[None, :] & (k < K)[:, None], other=0.0)
        low = added(low, h, w)
    if gates is not None:
        low *= tl.load(gates + sample * gates_b + ranks, mask=ranks < r, other=0.0).to(tl.float32)[None, :]
    low = low.to(up.dtype.element_ty)
    for start in range(0, C, BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        written = (tokens < T)[:, None] & (c < C)[None, :]
        y = tl.load(output_rows + (c.to(tl.int64) * output_c)[None, :], mask=written, other=0.0).to(tl.float32)
        there = up + (c.to(tl.int64) * up_c)[None, :] + ranks[:, None]
        w = tl.load(there, mask=(ranks < r)[:, None] & (c < C)[None, :], other=0.0)
        y = tl.dot(low, w, y, input_precision="ieee")
        tl.store(out_rows + (c.to(tl.int64) * out_c)[None, :], y.to(out.dtype.element_ty), mask=written)


def gated_lora_fwd(
    hidden: Tensor,
    output: Tensor,
    down: Tensor,
    up: Tensor,
    gates: Tensor | None,
    channels_first: bool = False,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """output + up·(gates ⊙ down·hidden) at every token.

    hidden: [B, ..., K]; output: [B, ..., C]; with channels_first [B, K, ...] and [B, C, ...]; down: [r, K]; up: [C, r], r ≤ 64;
    gates: [B or 1, r], or None for 1 → like output, channels last if output is, else contiguous.
    Raises: ValueError naming the argument whose shape, dtype or device is another; for a rank above 64.
    """
    name = "gated_lora_channels_first" if channels_first else "gated_lora"
    require(name, hidden=hidden, output=output, down=down, up=up, gates=gates)
    r, K = down.shape
    if r > MAX_RANK:
        raise ValueError(f"gated_lora: down must have a rank of at most {MAX_RANK}, found {r}")
    launch = chosen("gated_lora", CONFIGS, config, hidden.dtype, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_stages=2)
    out = torch.empty_like(output, memory_format=torch.preserve_format if channels_last(output) else torch.contiguous_format)
    if not out.numel():
        return out
    h, y, o = (_tokens(tensor, channels_first) for tensor in (hidden, output, out))
    down, up, gates = packed(down), packed(up), None if gates is None else packed(gates)
    B, T, C = y.shape
    tiles = triton.cdiv(T, launch["BLOCK_M"])
    gated_lora_fwd_kernel[(B * tiles,)](
        h, y, down, up, gates, o,
        *h.stride(), *y.stride(), down.stride(0), up.stride(0), per_sample(gates), *o.stride(),
        T, K, C, r, tiles,
        BLOCK_R=max(16, triton.next_power_of_2(r)), **launch,
    )  # fmt: skip
    return out


def _tokens(tensor: Tensor, channels_first: bool) -> Tensor:
    """[B, T, channels], a view where possible."""
    if channels_first:
        return tensor.reshape(*tensor.shape[:2], math.prod(tensor.shape[2:])).transpose(1, 2)
    return tensor.reshape(len(tensor), math.prod(tensor.shape[1:-1]), tensor.shape[-1])
