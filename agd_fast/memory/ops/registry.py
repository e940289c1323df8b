"""What every op is made of: a reference in torch, and an operator `agd_fast_memory::<name>` of its signature.

The operator runs the compiled extension on CUDA, the reference elsewhere. Operators are functional; their shapes are the fake's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "agd_fast_memory"
REFERENCES: dict[str, Callable[..., Any]] = {}  # by the operator's name
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # by the extension; NotImplemented where it does not take the arguments
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Register the operator of a reference `<name>_ref`; returns its overload, which is called by position.

    fake: empty outputs of the right shapes. cuda: what LAUNCHERS keeps.
    """
    name = reference.__name__.removesuffix("_ref")
    schema = torch.library.infer_schema(reference, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)

    def launch(*args: Any) -> Any:
        found = cuda(*args)
        return reference(*args) if found is NotImplemented else found

    _LIBRARY.impl(name, launch, "CUDA")
    REFERENCES[name], LAUNCHERS[name] = reference, cuda
    return getattr(getattr(torch.ops, NAMESPACE), name).default
