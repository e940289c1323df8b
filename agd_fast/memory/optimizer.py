"""AdamW whose moments lie in host memory: no bytes of a card, no digit less than AdamW's own.

A step follows dozens of forwards where memory is short, so that the way of the moments over the bus is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


class HostAdamW(AdamW):
    """torch.optim.AdamW, a parameter at a time, whose moments visit that parameter's device for its step.

    On a CPU it is AdamW. The gradients are on the parameters' device, so that their norm is clipped as ever, over several
    micro-batches and processes.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, foreach=False, **settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, parameter.device)
                        self.param_groups = [{**group, "params": [parameter]}]
                        super().step()
                        self._move(parameter, torch.device("cpu"))
        finally:
            self.param_groups = groups
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for parameter in self.state:
            self._move(parameter, torch.device("cpu"))

    def _move(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state.get(parameter, {})
        for name in MOMENTS:
            if name in state:
                state[name] = state[name].to(device)
