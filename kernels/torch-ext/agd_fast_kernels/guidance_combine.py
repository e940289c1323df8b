"""ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)) in one pass over the two predictions, ω per sample."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, per_number
from .shapes import require

CONFIGS: tuple[dict[str, int], ...] = ({"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 8})


@triton.jit
def guidance_combine_fwd_kernel(uncond, cond, omega, out, uncond_b, cond_b, omega_b, size, blocks, BLOCK: tl.constexpr):
    """Program b·blocks + i combines elements i·BLOCK … of sample b; arithmetic in float32."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    elements = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    u = tl.load(uncond + sample * uncond_b + elements, mask=inside).to(tl.float32)
    c = tl.load(cond + sample * cond_b + elements, mask=inside).to(tl.float32)
    scale = tl.load(omega + sample * omega_b)
    tl.store(out + sample * size + elements, (u + scale * (c - u)).to(out.dtype.element_ty), mask=inside)


def sample_by_sample(tensor: Tensor) -> Tensor:
    """The tensor with each sample's elements contiguous; copied only where they are not: a slice of channels is not copied."""
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


def guidance_combine_fwd(uncond: Tensor, cond: Tensor, omega: Tensor, *, config: Mapping[str, int] | None = None) -> Tensor:
    """ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)).

    uncond, cond: [B, ...]; omega: [B or 1] float32 → [B, ...].
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("guidance_combine", uncond=uncond, cond=cond, omega=omega)
    launch = chosen("guidance_combine", CONFIGS, config, uncond.dtype)
    out = uncond.new_empty(uncond.shape)
    if out.numel():
        uncond, cond, size = sample_by_sample(uncond), sample_by_sample(cond), out[0].numel()
        blocks = triton.cdiv(size, launch["BLOCK"])
        guidance_combine_fwd_kernel[(len(out) * blocks,)](
            uncond, cond, omega, out, uncond.stride(0), cond.stride(0), per_number(omega), size, blocks, **launch
        )
    return out
