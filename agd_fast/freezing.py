"""Freezing a model while something is measured on it or trained beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from agd_fast.sites import find_modules
from agd_fast.spec import DenoiserSpec


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, eval mode and no gradients for parameters; both are restored afterwards."""
    modes = {child: child.training for child in module.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in module.parameters()}
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
        for parameter, flag in gradients.items():
            parameter.requires_grad_(flag)


@contextmanager
def differentiable(denoiser: nn.Module, spec: DenoiserSpec) -> Iterator[None]:
    """Inside, gradients pass through all of a denoiser in eval mode: the modules of `spec.train_mode` are in train mode.

    Raises: ValueError when a path matches nothing.
    """
    modules = [module for path in spec.train_mode for module in find_modules(denoiser, path).values()]
    with restoring(modules, ("training",)):
        for module in modules:
            module.training = True
        yield


@contextmanager
def restoring(modules: Iterable[nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Restore instance attributes with these names afterwards, on all modules; remove those that a module did not have."""
    before = {module: {name: vars(module)[name] for name in names if name in vars(module)} for module in modules}
    try:
        yield
    finally:
        for module, values in before.items():
            for name in names:
                vars(module).pop(name, None)
            vars(module).update(values)
