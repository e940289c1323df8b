"""Weights that an optimized forward reads in other forms: joined projections, convolutions with channels side by side."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import agd_fast as agd
from agd_fast.attaching import scoped
from agd_fast.engine.copies import Copies, prefers_channels_last
from agd_fast.graph.projections import TILE, WAVES, leaves_card_idle
from helpers_engine import add_lora, assert_same, call, differs, twins
from helpers_pipelines import sample
from tiny import FAMILIES

OTHER = agd.EngineConfig(join_projections=True, channels_last=True)
FAST = {"unet": "sd15", "dit": "dit", "joint": "sd3", "long skips": "sdxl"}


@pytest.fixture
def turned(monkeypatch):
    """What is made of each weight in channels-last order, without keeping it; no garbage is collected by the way."""
    found, own = [], Copies.channels_last

    def channels_last(copies, weight):
        made = own(copies, weight)
        found.append(StorageWeakRef(made.untyped_storage()))
        return made

    monkeypatch.setattr(Copies, "channels_last", channels_last)
    gc.disable()
    yield found
    gc.enable()


def engine(pipe):
    return agd.info(pipe)["engine"]


@pytest.fixture(scope="module")
def unets():
    plain, fast = twins()
    agd.optimize(fast, OTHER)
    return plain, fast


@pytest.mark.parametrize("name", FAST.values(), ids=FAST)
def test_outputs_are_equal(name):
    family = FAMILIES[name]
    plain, fast = twins(family.pipeline)
    agd.optimize(fast, OTHER)
    for _ in range(2):
        found, expected = (sample(pipe, family, **family.guided) for pipe in (fast, plain))
        assert_same(found, expected)
    assert engine(fast)["joined"] > 0 and engine(fast)["copied_bytes"] > 0 and not engine(fast)["plain_because"]


def test_the_model_keeps_its_own_weights(unets):
    _, fast = unets
    before = {name: (id(one), one.data_ptr(), one._version, one.stride()) for name, one in fast.unet.named_parameters()}
    call(fast)
    assert before == {name: (id(one), one.data_ptr(), one._version, one.stride()) for name, one in fast.unet.named_parameters()}


def test_outputs_lie_as_the_models_own_do(unets):
    unet = unets[1].unet
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor(1), torch.randn(1, 3, unet.config.cross_attention_dim)
    with torch.no_grad(), agd.guided(unet, 3.0):
        outputs = [unet(x, t, c, return_dict=False)[0] for _ in range(3)]
    assert all(output.is_contiguous() for output in outputs) and engine(unets[1])["captured"] >= 1


def test_copies_are_made_once_for_all_shapes():
    _, fast = twins()
    agd.optimize(fast, replace(OTHER, merge=False))
    call(fast)
    once = engine(fast)["copied_bytes"]
    call(fast, num_images_per_prompt=2)
    assert engine(fast)["captured"] == 2 and engine(fast)["copied_bytes"] == once > 0


def test_weights_that_change_are_copied_again():
    plain, fast = twins()
    agd.optimize(fast, OTHER)
    before = call(fast)
    for pipe in (plain, fast):
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(1.5)
            next(m for m in pipe.unet.modules() if hasattr(m, "to_q")).to_q.weight.mul_(1.5)
    assert_same(call(fast), call(plain))
    assert differs(before, call(fast))


def test_projections_beside_a_lora_are_joined_too():
    plain, fast = twins()
    for pipe in (plain, fast):
        torch.manual_seed(0)
        add_lora(pipe)
    agd.optimize(fast, OTHER)
    assert_same(call(fast), call(plain))
    assert engine(fast)["joined"] > 0
    for pipe in (plain, fast):
        pipe.unet.disable_adapters()
    assert_same(call(fast), call(plain))


def test_where_a_product_leaves_the_card_idle(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=4))
    rows = 256
    least = 4 * WAVES * TILE // rows  # tokens that keep it busy

    def tokens(count, device="cuda"):
        return SimpleNamespace(device=torch.device(device), shape=(1, count, 32), numel=lambda: 32 * count)

    assert leaves_card_idle(tokens(least - 1), rows) and not leaves_card_idle(tokens(least), rows)
    assert not leaves_card_idle(tokens(1, "cpu"), rows)


def test_which_models_prefer_channels_last():
    convolutions = nn.Sequential(*[nn.Conv2d(4, 4, 3) for _ in range(8)])
    assert not prefers_channels_last(convolutions)  # on a CPU
    cuda = [SimpleNamespace(groups=1, weight=SimpleNamespace(device=torch.device("cuda"))) for _ in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agd_fast.engine.copies._convolutions", lambda model: model)
        assert prefers_channels_last(cuda) and not prefers_channels_last(cuda[:7])
        cuda[3].groups = 4
        assert not prefers_channels_last(cuda)


def test_pieces_that_are_joined_from_the_same_are_the_same():
    copies, a, b = Copies(), torch.ones(2), torch.full((1,), 3.0)
    joined = copies.joined([a, 2, b])
    assert joined.tolist() == [1, 1, 0, 0, 3]
    other = copies.joined([a, 3, b])
    assert copies.joined([a, 2, b]) is joined is not other
    assert copies.bytes == 4 * (5 + 6)


@pytest.mark.parametrize("name", ["conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"])
def test_writes_that_leave_no_trace_are_taken_over_by_the_next_call(name):
    plain, fast = twins(FAMILIES["sd15"].pipeline)
    agd.optimize(fast, OTHER)
    before = call(fast)
    for pipe in (plain, fast):
        dict(pipe.unet.named_parameters())[name].data.mul_(-2)
    assert_same(call(fast), call(plain))
    assert differs(before, call(fast)) and engine(fast)["captured"] == 1


class Flat(nn.Module):
    """Takes for granted how images lie."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.Sequential(*[nn.Conv2d(2, 2, 3, padding=1) for _ in range(8)])
        self.out = nn.Linear(2 * 4 * 4, 2 * 4 * 4)

    def forward(self, sample, timestep):
        hidden = self.convolutions(sample) * timestep.float().view(-1, 1, 1, 1)
        return self.out(hidden.view(len(hidden), -1)).view_as(sample)


@torch.no_grad()
def test_code_that_asks_how_images_lie_is_captured_as_it_is():
    model = Flat().eval()
    spec = agd.DenoiserSpec()
    agd.optimize(model, OTHER, spec=spec)
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([3])
    expected = model._call_impl(x, t)
    with scoped(model, t):
        outputs = [model(x, t) for _ in range(3)]
    for output in outputs:
        assert_same(output, expected)
    assert engine(model)["captured"] == 1 and not engine(model)["plain_because"]
    assert "channels-last" in engine(model)["slower_because"][0]


class FlatFor(Flat):
    """Asks it of batches of some sizes alone."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) if len(sample) in self.batches else self.convolutions(sample)


@pytest.mark.parametrize(("batches", "read"), [((1, 2, 3), False), ((2,), True)], ids=["from the first", "once copies are read"])
@torch.no_grad()
def test_what_does_not_take_channels_last_is_not_tried_again(batches, read, turned):
    model, t = FlatFor(batches).eval(), torch.tensor([3])
    agd.optimize(model, OTHER, spec=agd.DenoiserSpec())

    def assert_right(size):
        x = torch.randn(size, 2, 4, 4)
        for _ in range(2):
            with scoped(model, t):
                assert_same(model(x, t), model._call_impl(x, t))

    for size in (1, 2, 3):
        assert_right(size)
    tries = len(turned) / len(model.convolutions)
    assert tries == (2 if read else 1) and engine(model)["captured"] == 3
    assert bool(engine(model)["copied_bytes"]) == read and all(one.expired() != read for one in turned)
    model.convolutions[0].weight.data.mul_(-2)
    assert_right(1)


class Deciding(FlatFor):
    """By values, in batches of one."""

    def forward(self, sample, timestep):
        return super().forward(sample, timestep) if len(sample) > 1 or sample.sum() > 0 else sample


@torch.no_grad()
def test_what_cannot_be_captured_at_all_says_nothing_of_channels_last():
    model, t = Deciding(()).eval(), torch.tensor([3])
    agd.optimize(model, OTHER, spec=agd.DenoiserSpec())
    with scoped(model, t), pytest.warns(UserWarning, match="cannot be recorded"):
        model(torch.randn(1, 2, 4, 4), t)
    assert engine(model)["copied_bytes"] == 0 and not engine(model)["slower_because"]
    with scoped(model, t):
        model(torch.randn(2, 2, 4, 4), t)
    assert engine(model)["copied_bytes"] and engine(model)["captured"] == 1


@torch.no_grad()
def test_copies_go_with_the_engine(turned):
    model, t = FlatFor(()).eval(), torch.tensor([3])
    agd.optimize(model, OTHER, spec=agd.DenoiserSpec())
    with scoped(model, t):
        model(torch.randn(1, 2, 4, 4), t)
    gc.collect()  # what the recording left
    assert engine(model)["copied_bytes"] and turned and not any(one.expired() for one in turned)
    agd.optimize(model, None, spec=agd.DenoiserSpec())
    assert all(one.expired() for one in turned)


def test_what_nobody_reads_goes_and_the_rest_follows():
    copies, weight = Copies(), torch.ones(2, 2, 3, 3)
    joined, turned = copies.joined([weight, weight]), copies.channels_last(weight)
    twin, middle = copies.twin(turned, turned.stride()), copies.centre(turned)
    assert twin.stride() == turned.stride() and copies.own(turned) is weight and copies.own(twin) is twin
    assert copies.channels_last(weight) is turned and copies.centre(weight) is middle
    assert copies.bytes == sum(one.nbytes for one in (joined, turned, twin, middle))
    weight.fill_(5)
    copies.renew()
    assert all((one == 5).all() for one in (joined, turned, twin, middle))
    del turned
    assert copies.bytes == sum(one.nbytes for one in (joined, twin, middle))
    copies.renew()


def test_weights_that_lie_so_already_are_not_copied():
    _, fast = twins()
    fast.unet.to(memory_format=torch.channels_last)
    agd.optimize(fast, agd.EngineConfig(channels_last=True, merge=False))
    call(fast)
    assert engine(fast)["captured"] == 1 and engine(fast)["copied_bytes"] == 0
