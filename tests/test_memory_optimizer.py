"""AdamW whose moments lie in host memory."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from agd_fast.memory import optimizer as module
from agd_fast.memory.optimizer import HostAdamW, cut
from helpers_distillation import assert_same_tensors

WEIGHTS = ((8, 3), (16,), (), (2, 8, 4, 2))  # chunks that a CPU computes otherwise than their whole are not of a CPU


def steps_of_adamw(weight_decay):
    """That HostAdamW gives what AdamW does: two groups, going on from what was saved, and where a gradient is missing."""
    runs = {}
    for make in (AdamW, HostAdamW):
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(size)) for size in WEIGHTS]
        parameters[3].data = parameters[3].data.to(memory_format=torch.channels_last)
        groups = partial(list, ({"params": parameters[:3]}, {"params": parameters[3:], "lr": 0.2}))
        optimizer = make(groups(), lr=0.1, weight_decay=weight_decay)
        for step in range(5):
            if step == 2:  # goes on from what it saved
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = make(groups(), lr=0.5, weight_decay=weight_decay)
                optimizer.load_state_dict(state)
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if step != 1:
                parameters[0].grad = None  # once there was one
            if step < 4:
                parameters[2].grad = None  # not before the end
            optimizer.step()
        runs[make] = parameters, optimizer.state_dict()["state"]
    for found, expected in zip(runs[HostAdamW][0], runs[AdamW][0], strict=True):
        assert torch.equal(found, expected)
    assert runs[HostAdamW][1].keys() == runs[AdamW][1].keys()
    for index, state in runs[AdamW][1].items():
        assert_same_tensors(runs[HostAdamW][1][index], state)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_moments_in_host_memory_take_the_steps_of_adamw(decay):
    steps_of_adamw(decay)


class Card:
    """A CPU that has streams: what is sent to it is other memory, and what happens in which order is written down."""

    def __init__(self, monkeypatch):
        self.events = []
        monkeypatch.setattr(module, "_streams", lambda device: (Stream(self, "a"), Stream(self, "b")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(module, "_pin", lambda row: "")
        monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: tensor.clone())
        own = AdamW.step
        monkeypatch.setattr(AdamW, "step", lambda optimizer: (self.events.append("step"), own(optimizer)))

    @contextmanager
    def on(self, stream):
        self.events.append(f"on {stream.name}")
        yield
        self.events.append("off")


class Stream:
    device = torch.device("cpu")

    def __init__(self, card, name):
        self.card, self.name = card, name

    def wait_stream(self, other):
        self.card.events.append(f"{self.name} waits for {other}")

    def synchronize(self):
        self.card.events.append(f"{self.name} is done")


@pytest.mark.parametrize("elements", [8, 32, 2**22])
def test_moments_that_leave_host_memory_come_back(elements, monkeypatch):
    Card(monkeypatch)
    monkeypatch.setattr(module, "CHUNK", elements * 8)
    steps_of_adamw(0.1)


def test_chunks_take_turns_on_two_streams_that_wait_for_gradients_and_are_done_after_the_step(monkeypatch):
    card = Card(monkeypatch)
    monkeypatch.setattr(module, "CHUNK", 3 * 8)
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    optimizer = HostAdamW(parameters)
    for parameter in (parameters[0], parameters[1], parameters[3]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert sorted(card.events[:2]) == ["a waits for current", "b waits for current"]
    assert card.events[2:-2] == ["on a", "step", "off", "on b", "step", "off", "on b", "step", "off"]
    assert sorted(card.events[-2:]) == ["a is done", "b is done"]


def test_moments_stay_in_the_same_memory():
    parameters = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))]
    optimizer = HostAdamW(parameters)
    places = []
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moments = [state[name] for state in optimizer.state_dict()["state"].values() for name in module.MOMENTS]
        places.append([one.data_ptr() for one in moments])
    assert places[0] == places[1] and len({*places[0]}) == 4


def test_a_group_that_is_added_takes_its_steps():
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer, expected = HostAdamW(parameters[:1], lr=0.1), AdamW([nn.Parameter(torch.ones(3))], lr=0.1)
    other = expected.param_groups[0]["params"][0]
    for turn in range(2):
        for parameter in (*parameters, other):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        expected.step()
        if not turn:
            optimizer.add_param_group({"params": parameters[1:]})
    assert torch.equal(parameters[0], other) and (parameters[1] < 1).all()


def test_chunks_cut_parameters():
    first, empty, second = torch.empty(3), torch.empty(0), torch.empty(7)
    assert [(start, [(id(one), *ends) for one, *ends in pieces]) for start, pieces in cut([first, empty, second], 4)] == [
        (0, [(id(first), 0, 3), (id(second), 0, 1)]),
        (4, [(id(second), 1, 5)]),
        (8, [(id(second), 5, 7)]),
    ]


def test_parameters_of_several_dtypes_take_their_steps():
    parameters = [nn.Parameter(torch.ones(2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.float32)]
    optimizer = HostAdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all((parameter < 1).all() for parameter in parameters)
    assert all(optimizer.state[one]["exp_avg"].dtype == one.dtype for one in parameters)


def test_moments_that_cannot_be_pinned_take_their_steps_from_pageable_memory(monkeypatch):
    """It is said once an optimizer, though CUDA refuses every row, and those that are laid out anew; and CUDA's last error is
    taken away from whoever launches next."""
    pin, zeros, cleared = module._pin, torch.zeros, []
    Card(monkeypatch)
    monkeypatch.setattr(module, "_pin", pin)
    monkeypatch.setattr(module, "CHUNK", 8 * 8)

    def check(code):
        raise torch.cuda.CudaError(f"operation not supported ({code})")

    def launch(*size, device=None, **settings):
        if device is None:
            return zeros(*size, **settings)
        cleared.append(device)
        raise RuntimeError("operation not supported, of an earlier call")

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 801, cudaHostUnregister=lambda _: pytest.fail("was not registered"))
    monkeypatch.setattr(torch.cuda, "CudaError", RuntimeError)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    monkeypatch.setattr(torch, "zeros", launch)
    with pytest.warns(UserWarning, match="pageable memory") as warned:
        steps_of_adamw(0.1)
    assert {str(one.message).partition(": ")[2] for one in warned} == {"operation not supported (801)"}
    assert len(warned) == 2 and len(cleared) == 2 * 2  # optimizers, groups
    optimizer = HostAdamW([nn.Parameter(torch.ones(3))])
    with pytest.warns(UserWarning, match="pageable memory"):
        optimizer.load_state_dict(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(optimizer.state_dict())
    assert len(cleared) == 2 * 2 + 2
