"""A fingerprint of a model sees what a captured forward took for granted, and nothing else."""

import copy

import pytest
import torch
from torch import nn

from agd_fast.engine.fingerprint import Fingerprint, obstacle
from agd_fast.graph.levels import Level
from helpers_engine import SCALE
from helpers_pipelines import attach, model

STATIC, STEP, MOVING = Level.STATIC, Level.STEP, Level.MOVING


class Scaled:
    """A processor of attention, as diffusers has them."""

    def __init__(self):
        self.scale, self.options = 1.0, {"masks": [None], "rank": 4}


@pytest.fixture
def module():
    this = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Linear(3, 3)))
    this[0].processor = Scaled()
    this[0].scaling = {"style": 1.0}
    return this.eval()


def write_tensor(this):
    with torch.no_grad():
        this[2][0].weight.mul_(1)


def give_parameter(this):
    this[0].bias = nn.Parameter(this[0].bias.detach().clone())


def give_processor(this):
    this[0].processor = Scaled()


def change_scale(this):
    this[0].processor.scale = 0.5


def change_option(this):
    this[0].processor.options["rank"] = 8


def change_list(this):
    this[0].processor.options["masks"].append(1)


def change_value(this):
    this[0].scaling["style"] = 0.5


def add_module(this):
    this[2].add_module("more", nn.Linear(3, 3))


def replace_module(this):
    this[2][0] = copy.deepcopy(this[2][0])


def swap_modules(this):
    this[0], this[2] = this[2], this[0]


def change_class(this):
    this[0].__class__ = type("Other", (nn.Linear,), {})


def write_buffer(this):
    this[1].running_mean.add_(1)


CHANGES = [write_tensor, give_parameter, give_processor, change_scale, change_option, change_list, change_value, add_module]
CHANGES += [replace_module, swap_modules, change_class, write_buffer]
CHANGES += [
    lambda this: this[2].register_forward_hook(lambda *_: None),
    lambda this: this[2].register_forward_pre_hook(lambda *_: None),
    lambda this: this.train(),
    lambda this: this.double(),
    lambda this: setattr(this[2][0].weight, "data", this[2][0].weight.data.clone()),
    lambda this: setattr(this[1].running_mean, "data", this[1].running_mean.data.view(torch.int32)),
    lambda this: delattr(this[0], "scaling"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_model_is_seen(module, change):
    kept = Fingerprint([module])
    assert kept.holds([module])
    change(module)
    assert not kept.holds([module])
    assert Fingerprint([module]).holds([module])


def test_what_a_forward_does_is_no_change(module):
    kept = Fingerprint([module])
    for _ in range(2):
        module(torch.randn(2, 3)).sum().backward()
    module.state_dict()
    module[0].scaling = {"style": 1.0}
    assert kept.holds([module])


def test_a_change_that_is_taken_back_is_none(module):
    kept = Fingerprint([module])
    module[0].processor.scale = 0.5
    module[0].processor.scale = float("1.0")
    assert kept.holds([module])


def test_another_adapter_is_a_change(module):
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    kept = Fingerprint([module, first])
    for roots in ([module], [module, second], [first, module], [module, first, second]):
        assert not kept.holds(roots)
    assert kept.holds([module, first])


def test_a_whole_forward_changes_nothing_of_a_denoiser():
    this = model("unet")
    attach(this.denoiser)
    kept = Fingerprint([this.denoiser])
    with torch.no_grad():
        this()
        this(SCALE)
    assert kept.holds([this.denoiser])
    assert obstacle(this.denoiser) == ""
