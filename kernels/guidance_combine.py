"""ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)) in one pass over the two predictions, ω per sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def guidance_combine_fwd_kernel(uncond, cond, omega, out, size, BLOCK: tl.constexpr):
    """Program (b, i) combines elements i·BLOCK … of sample b; arithmetic in float32."""
    sample = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    where = sample * size + offsets
    u = tl.load(uncond + where, mask=mask).to(tl.float32)
    c = tl.load(cond + where, mask=mask).to(tl.float32)
    scale = tl.load(omega + sample)
    tl.store(out + where, (u + scale * (c - u)).to(out.dtype.element_ty), mask=mask)


def guidance_combine_fwd(uncond: torch.Tensor, cond: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """uncond, cond: [B, ...] of one dtype; omega: [B] float32 → [B, ...].

    Raises: ValueError naming the argument whose shape or dtype is not that.
    """
    if cond.shape != uncond.shape or cond.dtype != uncond.dtype:
        raise ValueError(f"cond must be {tuple(uncond.shape)} {uncond.dtype}, found {tuple(cond.shape)} {cond.dtype}")
    if omega.shape != uncond.shape[:1] or omega.dtype != torch.float32:
        raise ValueError(f"omega must be [{len(uncond)}] float32, found {tuple(omega.shape)} {omega.dtype}")
    uncond, cond, omega = uncond.contiguous(), cond.contiguous(), omega.contiguous()
    out = torch.empty_like(uncond)
    if out.numel():
        size = out[0].numel()
        guidance_combine_fwd_kernel[(len(out), triton.cdiv(size, BLOCK))](uncond, cond, omega, out, size, BLOCK=BLOCK)
    return out
