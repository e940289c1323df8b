"""Arguments of the packing ops."""

from typing import Any

import torch

from agd_fast.memory import ops


def arguments(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, R: int = 6, n: int = 48) -> dict[str, tuple[Any, ...]]:
    """Of every packing op, by its name."""
    x, rstd, mean = torch.randn(R, n).to(device, dtype), torch.rand(R, device=device), torch.randn(R, device=device)
    with torch.no_grad():
        packed, rows = ops.pack(x, 4, 32), ops.norm_pack(x, mean, rstd, 4, 32)
        factors = ops.geglu_pack(x, x, "none", 8, 64)
    A, gamma = torch.randn(2, 36, device=device), torch.randn(36, device=device, dtype=dtype)
    return {
        "pack": (x, 4, 32),
        "unpack": (*packed, [n, R], 4, 32, dtype),
        "scale_unpack": (x, *packed, 4, 32),
        "gelu_pack": (x, "tanh", 8, 128),
        "silu_pack": (x, 4, 64),
        "geglu_pack": (*x.chunk(2, -1), "none", 4, 32),
        "swiglu_pack": (*x.chunk(2, -1), 8, 64),
        "geglu_backward": (x, *factors, 8, 64),
        "norm_pack": (x, mean, rstd, 4, 32),
        "norm_backward": (x, *rows, rstd, gamma, True, 3, 4, 4, 32),
        "affine_unpack": (*rows, A, A, [2, 3, n], 3, 3, 4, 4, 32, dtype),
        "silu_affine_backward": (x, *rows, A, None, 3, 3, 4, 4, 32),
    }
