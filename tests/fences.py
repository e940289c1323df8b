"""Memory that ends a process which reads or writes beside a tensor: kernels in Triton's interpreter, looked at for that."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_NOTHING = 0  # PROT_NONE


class Fences(TorchDispatchMode):
    """Every tensor that is made inside ends where a page that nobody may touch begins, or begins where one ends."""

    def __init__(self, side: Literal["end", "begin"]) -> None:
        super().__init__()
        self.side = side

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.device.type != "cpu" or leaf.untyped_storage()._cdata in given:
                return leaf
            return fenced(leaf, self.side)

        return tree_map(moved, found)


def fenced(tensor: Tensor, side: Literal["end", "begin"]) -> Tensor:
    """A copy in the tensor's own strides."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor
    size, page = elements * tensor.itemsize, mmap.PAGESIZE
    room = -(-size // page) * page
    pages = mmap.mmap(-1, room + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for fence in (address, address + page + room):
        if _LIBC.mprotect(fence, page, _NOTHING):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = page + (room - size if side == "end" else 0)
    flat = torch.frombuffer(memoryview(pages)[start : start + size], dtype=torch.uint8).view(tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
