"""What every op is made of: a reference in torch, and an operator `agd_fast_memory::<name>` with its signature.

The operator runs the compiled extension on CUDA, the reference elsewhere. Operators are functional; the fake gives their shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "agd_fast_memory"
REFERENCES: dict[str, Callable[..., Any]] = {}  # by the operator's name
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # run the extension; NotImplemented if it does not support the arguments
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any]) -> Any:
    """Register the operator of a reference `<name>_ref`; returns its overload, which is called by position.

    fake: gives empty outputs of the right shapes. cuda: the launcher, kept in LAUNCHERS.
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
