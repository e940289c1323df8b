"""The one rule for the error of a kernel: at most twice PyTorch's error in the same dtype, plus one rounding."""

from __future__ import annotations

from typing import Any

import torch

from agd_fast.ops.registry import tensors_of


def off(found: Any, plain: Any, exact: Any) -> str:
    """Why a result breaks the rule, or has another shape or dtype; empty where it does not.

    found, plain, exact: what the kernel gives, and the reference in the same dtype and in float64; a tensor or a tuple of them.
    """
    for index, (one, own, true) in enumerate(zip(*map(tensors_of, (found, plain, exact)), strict=True)):
        if one.shape != own.shape or one.dtype != own.dtype:
            return f"output {index}: expected {own.dtype} {list(own.shape)}, found {one.dtype} {list(one.shape)}"
        if not one.numel():
            continue
        error, lost = (float((result.double() - true.double()).abs().max()) for result in (one, own))
        floor = torch.finfo(own.dtype).eps * float(true.abs().max())
        if not error <= 2 * lost + floor:
            return f"output {index}: off by {error:.3g}, torch by {lost:.3g}, a rounding is {floor:.3g}"
    return ""
