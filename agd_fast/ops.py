"""The operations that may run on a kernel of ours: the one door to `kernels/` and `csrc/`.

Every op has a torch reference of the same signature, which is also the default. A Triton kernel is used for CUDA tensors
when the environment says AGD_FAST_KERNELS=1: none has been timed on a GPU yet, so none is on by itself.
"""

from __future__ import annotations

import os
from importlib import util

import torch
from torch import Tensor


def kernels_wanted() -> bool:
    return os.environ.get("AGD_FAST_KERNELS") == "1" and not kernels_missing()


def kernels_missing() -> str:
    """Why no kernel can run here; empty when they can."""
    for package in ("triton", "agd_fast_kernels"):
        if util.find_spec(package) is None:
            return f"{package} is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device"


def absorbed_attention_ref(
    hidden: Tensor, output: Tensor, A: Tensor, U: Tensor, bias: Tensor | None = None, *, heads: int = 1
) -> Tensor:
    """The reference of `absorbed_attention`."""
    x, keys = hidden.flatten(1, -2), A.to(hidden.dtype).transpose(1, 2)  # [B, T, C_in], [B, C_in, heads·S]
    if hidden.dtype == torch.float32:
        scores = torch.bmm(x, keys) if bias is None else torch.baddbmm(bias, x, keys)
    else:  # scores are never rounded to fewer bits than float32
        scores = torch.bmm(x.float(), keys.float()) if x.is_cpu else torch.bmm(x, keys, out_dtype=torch.float32)
        scores = scores if bias is None else scores + bias
    P = scores.unflatten(-1, (heads, -1)).softmax(dim=-1).flatten(2)
    mixed = torch.baddbmm(output.flatten(1, -2), P.to(output.dtype), U.to(output.dtype))
    return mixed.view_as(output)


def absorbed_attention(
    hidden: Tensor, output: Tensor, A: Tensor, U: Tensor, bias: Tensor | None = None, *, heads: int = 1
) -> Tensor:
    """output + softmax(x·Aᵀ + bias)·U over each head's tokens: attention whose projections were put into its keys and values.

    hidden: x [B, ..., C_in]; output: [B, ..., C]; A: [B, heads·S, C_in]; U: [B, heads·S, C]; bias: [B, 1, heads·S] float32.
    """
    return absorbed_attention_ref(hidden, output, A, U, bias, heads=heads)


def guidance_combine_ref(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    """The reference of `guidance_combine`."""
    scale = omega.view(-1, *[1] * (cond.ndim - 1)).to(cond.dtype)
    return uncond + scale * (cond - uncond)


def guidance_combine(uncond: Tensor, cond: Tensor, omega: Tensor) -> Tensor:
    """ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)) (Ho & Salimans, arXiv 2207.12598, eq. 6 with ω = 1 + w).

    uncond, cond: [B, ...]; omega: [B] float32.
    """
    if cond.is_cuda and kernels_wanted():
        from agd_fast_kernels.guidance_combine import guidance_combine_fwd

        return guidance_combine_fwd(uncond, cond, omega)
    return guidance_combine_ref(uncond, cond, omega)
