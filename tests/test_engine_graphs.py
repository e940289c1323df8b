"""The engine's CUDA graphs, of which `host_graph` makes what a CPU can run."""

from typing import ClassVar

import pytest
import torch
from torch import nn

import agd_fast as agd
from agd_fast.attaching import scoped
from agd_fast.engine import engine_of, graphs, program
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.tables import RowLayout
from helpers_engine import SCALE, assert_same, call, programs, twins
from helpers_families import attach_trained, denoisers, run
from host_graph import HostGraph
from test_engine_families import PLAIN
from tiny import FAMILIES


class Recording(graphs.GraphedStep):
    made: ClassVar[list["Recording"]] = []

    def _record(self, step, warmup):
        for _ in range(warmup):
            step(self.moving, self.kept)
        self.graph = HostGraph()
        with self.graph:
            self.outputs = step(self.moving, self.kept)
        self.made.append(self)

    @property
    def runs(self):
        return self.graph.runs


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    for module in (graphs, program):
        monkeypatch.setattr(module, "GraphedStep", Recording)
    monkeypatch.setattr(EngineConfig, "graphs", lambda self, device: self.graph is not False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    Recording.made = []
    return Recording.made


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PLAIN])
def test_every_family_is_as_before(name, recorded):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe)
    other = {one: value / 2 if isinstance(value, float) else value for one, value in family.guided.items()}
    plain = [run(pipe, family, **scales) for scales in (family.guided, other)]
    agd.optimize(pipe)
    for index, scales in ((0, family.guided), (0, family.guided), (1, other), (0, family.guided)):
        assert_same(run(pipe, family, **scales), plain[index])
    for denoiser in denoisers(pipe).values():
        info = engine_of(denoiser).info()
        assert info["captured"] and not info["plain_because"] and not info["slower_because"]
    assert all(one.runs for one in recorded)


def test_what_is_computed_ahead_is_recorded_at_its_second_run_and_anew_for_other_shapes(recorded):
    plain, fast = twins(kind="cross_attention")
    for number, expected in enumerate((1, 2, 2), 1):  # a step; what is ahead of it
        assert_same(call(fast), call(plain))
        assert len(recorded) == expected, number
    step, ahead = recorded
    assert (step.runs, ahead.runs) == (11, 2) and not ahead.kept and step.kept
    for _ in range(2):
        assert_same(call(fast, num_inference_steps=5), call(plain, num_inference_steps=5))
    assert [one.runs for one in recorded[2:]] == [10, 1]


def test_two_prompts_in_one_run_do_not_share_memory(recorded):
    plain, fast = twins()
    for pipe in (plain, fast):
        pipe.unet.eval()
    prompts = [torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def run(unet):
        with torch.no_grad(), agd.guided(unet, SCALE):
            return [unet(x, torch.tensor(500), encoder_hidden_states=prompts[index]).sample for index in (0, 1, 0, 1, 0)]

    for _ in range(3):
        for found, expected in zip(run(fast.unet), run(plain.unet), strict=True):
            assert_same(found, expected)


def test_what_cannot_be_recorded_ahead_runs_as_it_is(monkeypatch, recorded):
    plain, fast = twins()
    own = Recording.__init__

    def refuse(self, step, device, moving, kept, *rest, **options):
        if not kept:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        own(self, step, device, moving, kept, *rest, **options)

    monkeypatch.setattr(Recording, "__init__", refuse)
    for _ in range(3):
        assert_same(call(fast), call(plain))
    (one,) = programs(fast.unet)
    info, reason = engine_of(fast.unet).info(), "operation not permitted when stream is capturing"
    assert one.recorded.graph is None and info["plain_because"] == []
    assert info["slower_because"] == [f"what is computed ahead is launched one by one: no CUDA graph of it ({reason})"]


class OfItself(nn.Module):
    """Of nothing but x_t and t."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.linear(sample) * timestep.float().sin() + self.linear.weight.sum()


@pytest.mark.parametrize("schedule", [None, torch.tensor([3, 2])])
@torch.no_grad()
def test_a_model_to_which_nothing_is_given_that_does_not_move(schedule, recorded):
    model = agd.optimize(OfItself().eval(), spec=agd.DenoiserSpec())
    for _ in range(3):
        with scoped(model, schedule):
            for t in (torch.tensor([3]), torch.tensor([2])):
                x = torch.randn(2, 4)
                assert_same(model(x, t), model._call_impl(x, t))
    assert len(recorded) == 2 and not engine_of(model).info()["slower_because"]


def test_what_the_host_holds_is_not_recorded(recorded):
    """Its value would be the recording's for good."""
    ahead, number = graphs.Recorded(torch.device("cuda", 0)), torch.tensor(2.0)
    for value in (1.0, 2.0, 3.0):
        assert ahead(lambda given: [2 * one for one in given], [number.fill_(value)], "key") == [2 * value]
    assert not recorded and ahead.trouble.endswith("it is of tensors of other devices")


def test_packed_tensors_keep_their_strides():
    tensors = [
        torch.randn(2, 3, 4).transpose(1, 2),
        torch.randn(3, 8)[:, :5],
        torch.randn(4),
        torch.randn(2, 3).bfloat16(),
        torch.tensor(3),
    ]
    layout = RowLayout.of(tensors)
    views = layout.views(layout.packed(tensors, torch.device("cpu")))
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype and view.data_ptr() % 64 == views[0].data_ptr() % 64
    assert views[0].stride() == tensors[0].stride() and views[1].is_contiguous()
