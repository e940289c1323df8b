"""F.scaled_dot_product_attention: q, k and v are kept, and it runs again in backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from agd_fast.memory.interception import Run
from agd_fast.memory.provenance import again
from agd_fast.memory.saved import as_is

HEADS = (-3, -1)  # dimensions of the heads and of their channels
FEW_KEYS = 512  # up to so many keys, attention is cheap enough to run again for what reads its output


def scaled_dot_product_attention(
    run: Run,
    call: Callable[[], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query: [..., T, d]; key: [..., S, d]; value: [..., S, d_v]; attn_mask: broadcast to [..., T, S] → [..., T, d_v]."""
    inputs = (query, key, value)
    if dropout_p or not run.mode.attends_again or not any(run.replaces(one, attn_mask) for one in inputs):
        return call()
    with torch.no_grad():
        output = call()
    saved = tuple(run.provenance.save(one, run.mode.attention, channels=HEADS) for one in inputs)
    masks = () if attn_mask is None else (attn_mask,)
    attend = partial(_attend, dtype=output.dtype, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    output = run.attach("attention", output, partial(_backward, attend=attend), (*saved, *map(as_is, masks)), *inputs)
    if key.shape[-2] <= FEW_KEYS and not run.mode.exact:
        run.provenance.record(output, again(partial(_again, attend=attend), *saved, *map(as_is, masks), cost=1))
    return output


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dtype: torch.dtype, **options: Any
) -> Tensor:
    query, key, value = (one.to(dtype) for one in (query, key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


def _again(*values: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return attend(*values)


def _backward(gradient: Tensor, needs: Any, *values: Tensor, attend: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        inputs = [one.detach().requires_grad_(need) for one, need in zip(values[:3], needs, strict=True)]
        output = attend(*inputs, *values[3:])
    wanted = [one for one, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(output, wanted, gradient))
    return tuple(next(found) if need else None for need in needs)
