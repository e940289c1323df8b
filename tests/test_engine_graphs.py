"""The engine's CUDA graphs where there is no CUDA: what is recorded runs again on the same memory, as a graph does."""

from typing import ClassVar

import pytest
import torch

import agd_fast as agd
from agd_fast.engine import engine_of, graphs, program
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.tables import RowLayout
from helpers_engine import SCALE, assert_same, call, programs, twins
from helpers_pipelines import attach, sample
from tiny import FAMILIES


class Recording(graphs.GraphedStep):
    """A replay is one more run on the memory that was there at the recording; its results come in the same memory too."""

    made: ClassVar[list["Recording"]] = []

    def _record(self, step, warmup):
        self.step, self.runs = step, 0
        for _ in range(warmup):
            step(self.moving, self.kept)
        self.outputs = step(self.moving, self.kept)
        self.graph, self.device = self, torch.device("cuda")
        self.made.append(self)

    def replay(self):
        self.runs += 1
        for place, found in zip(self.outputs, self.step(self.moving, self.kept), strict=True):
            place.copy_(found)


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    for module in (graphs, program):
        monkeypatch.setattr(module, "GraphedStep", Recording)
    monkeypatch.setattr(EngineConfig, "graphs", lambda self, device: self.graph is not False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    Recording.made = []
    return Recording.made


@pytest.mark.parametrize("name", ["sd15", "sdxl", "dit", "sd3", "pixart", "wan"])
def test_runs_of_a_pipeline_are_as_exact(name, recorded):
    family = FAMILIES[name]
    plain, fast = family.pipeline(), family.pipeline()
    for pipe in (plain, fast):
        attach(pipe)
    agd.optimize(fast)
    for scale in (SCALE, SCALE, 2.0, SCALE):
        found, expected = (sample(pipe, family, **dict.fromkeys(family.guided, scale)) for pipe in (fast, plain))
        assert_same(found, expected)
    assert any(one.runs for one in recorded)


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

    def refuse(self, step, moving, kept, *rest, **options):
        if not kept:
            raise RuntimeError("operation not permitted when stream is capturing\nmore of it")
        own(self, step, moving, kept, *rest, **options)

    monkeypatch.setattr(Recording, "__init__", refuse)
    for _ in range(3):
        assert_same(call(fast), call(plain))
    (one,) = programs(fast.unet)
    info, reason = engine_of(fast.unet).info(), "operation not permitted when stream is capturing"
    assert one.recorded.graph is None and info["plain_because"] == []
    assert info["slower_because"] == [f"what is computed ahead is launched one by one: no CUDA graph of it ({reason})"]


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
