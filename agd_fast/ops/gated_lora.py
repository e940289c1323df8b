"""A low-rank term beside a block, its r directions scaled per sample: what `gated_lora` adapters add to every token."""

from __future__ import annotations

import torch
from agd_fast_kernels.shapes import MAX_RANK, require
from torch import Tensor
from torch.nn import functional as F

from agd_fast.ops.defining import define, define_composite, row


def gated_lora_ref(
    hidden: Tensor, output: Tensor, down: Tensor, up: Tensor, gates: Tensor | None, channels_first: bool = False
) -> Tensor:
    """output + up·(gates ⊙ down·hidden) at every token.

    hidden: [B, ..., K]; output: [B, ..., C]; with channels_first [B, K, ...] and [B, C, ...]; down: [r, K]; up: [C, r];
    gates: [B or 1, r], or None for 1 → like output, channels-last where output is, else contiguous.
    Raises: ValueError naming the argument whose shape, dtype or device does not fit.
    """
    name = "gated_lora_channels_first" if channels_first else "gated_lora"
    require(name, hidden=hidden, output=output, down=down, up=up, gates=gates)
    if channels_first and hidden.ndim > 2 and hidden.is_contiguous() and output.is_contiguous():
        low = torch.bmm(down.expand(len(hidden), -1, -1), hidden.flatten(2))  # [B, r, T]
        low = low if gates is None else low * row(gates, low, 1)
        return torch.baddbmm(output.flatten(2), up.expand(len(hidden), -1, -1), low).view_as(output)
    channels = 1 if channels_first else -1
    low = F.linear(hidden.movedim(channels, -1), down)  # [B, ..., r]
    low = low if gates is None else low * row(gates, low)
    return output + F.linear(low, up).movedim(-1, channels)


def _flops(hidden: Tensor, output: Tensor, down: Tensor, *_: object) -> int:
    return 2 * (hidden.numel() + output.numel()) * len(down)


def _limit(hidden: Tensor, output: Tensor, down: Tensor, *_: object) -> str:
    return "" if len(down) <= MAX_RANK else f"a rank of {len(down)}, more than {MAX_RANK}"


define(gated_lora_ref, flops=_flops, limit=_limit, like="output")
gated_lora = define_composite(gated_lora_ref)
