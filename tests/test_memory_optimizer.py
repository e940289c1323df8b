"""AdamW whose moments lie in host memory."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW

from agd_fast.memory.optimizer import HostAdamW
from helpers_distillation import assert_same_tensors


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_in_host_memory_take_the_steps_of_adamw(decay):
    torch.manual_seed(0)
    weights = [torch.randn(5, 3), torch.randn(7)]
    runs = {}
    for make in (AdamW, HostAdamW):
        torch.manual_seed(1)
        parameters = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = make(parameters, lr=0.1, weight_decay=decay)
        for step in range(4):
            if step == 2:  # goes on from what it saved
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(parameters, lr=0.5, weight_decay=decay)
                optimizer.load_state_dict(state)
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if step == 3:
                parameters[1].grad = None
            optimizer.step()
        runs[make] = parameters, optimizer.state_dict()["state"]
    for found, expected in zip(runs[HostAdamW][0], runs[AdamW][0], strict=True):
        assert torch.equal(found, expected)
    for index, state in runs[AdamW][1].items():
        assert_same_tensors(runs[HostAdamW][1][index], state)


def test_moments_are_on_the_device_for_the_step_of_their_parameter_alone(monkeypatch):
    """The devices that they are sent to, one parameter after another."""
    sent = []
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = HostAdamW(parameters)
    monkeypatch.setattr(
        HostAdamW, "_move", lambda self, p, device: sent.append((len(p), device, "step" in self.state.get(p, {})))
    )
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    cpu = torch.device("cpu")
    assert sent == [(3, cpu, False), (3, cpu, True), (2, cpu, False), (2, cpu, True)]
    sent.clear()
    optimizer.load_state_dict(optimizer.state_dict())
    assert sorted(sent) == sorted([(3, cpu, True), (2, cpu, True)], key=str) or len(sent) == 2
