"""All ops, and what each consists of."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from agd_fast_kernels.shapes import FLOAT32
from torch import Tensor
from torch.utils import _pytree as pytree

NAMESPACE = "agd_fast_kernels"
OPS: dict[str, Op] = {}


@dataclass(frozen=True, eq=False)
class Op:
    """reference: the same in torch, with this signature. overload: the opaque operator. launches: how many kernels it starts.
    limit: tells why the kernel cannot take given arguments, or "". library: the same by one call of a library, or None."""

    name: str
    reference: Callable[..., Any]
    signature: inspect.Signature
    overload: Any
    launches: int
    limit: Callable[..., str]
    library: Callable[..., Any] | None = None

    def kernel(self) -> Callable[..., Any]:
        """The launcher, which takes `config` too. Raises: ImportError without Triton."""
        return getattr(importlib.import_module(f"{NAMESPACE}.{self.name}"), f"{self.name}_fwd")

    def configs(self) -> tuple[Any, ...]:
        """How the kernel may be launched; the first is the default."""
        return importlib.import_module(f"{NAMESPACE}.{self.name}").CONFIGS

    def complete(self, args: Sequence[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> tuple[Any, ...]:
        """All arguments by position, with defaults for those left out: torch leaves some out when it calls an operator."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def in_double(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments in float64, except those that the op requires in float32."""
        pairs = zip(self.signature.parameters, args, strict=False)
        return tuple(one.double() if isinstance(one, Tensor) and name not in FLOAT32 else one for name, one in pairs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The opaque operator."""
        return self.overload(*args, **kwargs)


def tensors_of(args: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
