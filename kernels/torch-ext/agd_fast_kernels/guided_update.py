"""x_{t−1} = a·x_t + b·ε_cfg: guidance and a first-order scheduler's step in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from ._tiles import chosen, per_number
from .guidance_combine import sample_by_sample
from .shapes import require

CONFIGS: tuple[dict[str, int], ...] = ({"BLOCK": 1024, "num_warps": 4}, {"BLOCK": 4096, "num_warps": 8})


@triton.jit
def guided_update_fwd_kernel(
    uncond, cond, omega, x_t, a, b, out, uncond_b, cond_b, omega_b, x_t_b, a_b, b_b, size, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """Program b·blocks + i updates elements i·BLOCK … of sample b; arithmetic in float32."""
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    elements = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = elements < size
    u = tl.load(uncond + sample * uncond_b + elements, mask=inside).to(tl.float32)
    c = tl.load(cond + sample * cond_b + elements, mask=inside).to(tl.float32)
    x = tl.load(x_t + sample * x_t_b + elements, mask=inside).to(tl.float32)
    guided = u + tl.load(omega + sample * omega_b) * (c - u)
    updated = tl.load(a + sample * a_b) * x + tl.load(b + sample * b_b) * guided
    tl.store(out + sample * size + elements, updated.to(out.dtype.element_ty), mask=inside)


def guided_update_fwd(
    uncond: Tensor,
    cond: Tensor,
    omega: Tensor,
    sample: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    config: Mapping[str, int] | None = None,
) -> Tensor:
    """x_{t−1} = a·x_t + b·ε_cfg, with ε_cfg = ε(∅) + ω·(ε(c) − ε(∅)).

    uncond, cond, sample: [B, ...]; omega: [B or 1] float32; a, b: [B or 1] float32 → [B, ...].
    Raises: ValueError naming the argument whose shape, dtype or device is another.
    """
    require("guided_update", uncond=uncond, cond=cond, omega=omega, sample=sample, a=a, b=b)
    launch = chosen("guided_update", CONFIGS, config, uncond.dtype)
    out = uncond.new_empty(uncond.shape)
    if out.numel():
        uncond, cond, x_t = (sample_by_sample(tensor) for tensor in (uncond, cond, sample))
        size = out[0].numel()
        blocks = triton.cdiv(size, launch["BLOCK"])
        guided_update_fwd_kernel[(len(out) * blocks,)](
            uncond, cond, omega, x_t, a, b, out,
            uncond.stride(0), cond.stride(0), per_number(omega), x_t.stride(0), per_number(a), per_number(b), size, blocks,
            **launch,
        )  # fmt: skip
    return out
