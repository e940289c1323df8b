"""Functions of torch as a forward under agd_fast.memory runs them, and inputs for them."""

from __future__ import annotations

import torch

from agd_fast.memory.handlers import HANDLERS
from agd_fast.memory.interception import FrozenBackward, Run
from agd_fast.memory.provenance import Plan
from helpers_memory import SMALLEST


def run(mode, function, *inputs, plan=None):
    """Under the mode, as a forward would."""
    with FrozenBackward(Run(SMALLEST[mode], plan or Plan()), HANDLERS):
        return function(*inputs)


def frozen(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def wanted(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)
