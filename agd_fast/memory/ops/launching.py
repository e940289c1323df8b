"""Whether the extension's kernels support an op's arguments, and where they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agd_fast.memory.extension import extension_on

TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
ACTIVATIONS = {"none": 0, "tanh": 1, "silu": 2}
MOST = 2**33  # elements: kernels number chunks of 8, padded to groups, in 31 bits
MOST_OF_A_ROW = 2**31


def kernels_for(op: str, dtype: torch.dtype, elements: int, first: Tensor, *others: Tensor | None) -> Any:
    """The extension, or None if it is not there or does not support this dtype or number of elements.

    Raises: ValueError where the tensors are not all on the first one's device.
    """
    device = first.device
    for other in others:
        if other is not None and other.device != device:
            raise ValueError(f"{op}: expected all tensors on {device}, found one on {other.device}")
    if dtype not in TYPES or not 0 < elements < MOST:
        return None
    return extension_on(device.index)


def where(x: Tensor) -> tuple[int, int]:
    """The device's index and the current stream's handle."""
    index = x.device.index
    return index, torch._C._cuda_getCurrentRawStream(index)


def address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
