"""Passes of training as CUDA graphs where there is no CUDA: what is recorded runs again on the same memory, as a graph does."""

import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

from agd_fast.attaching import attach, attachment_of
from agd_fast.distillation import TrainConfig, graphed, job
from agd_fast.distillation.economy import Economy
from agd_fast.distillation.graphed import Passes, PassGraph, why_plain
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import _gradients, make_accelerator
from agd_fast.files import read_json, read_tensors
from agd_fast.freezing import frozen
from conftest import trained
from helpers_distillation import (
    after_calls,
    assert_same_tensors,
    collect_tiny,
    distill_tiny,
    logged,
    short,
    small,
    tiny_teacher,
)


class Recording(PassGraph):
    """Recording it computes nothing. A replay is one more run, on the tensors and the gradients that were there at that."""

    made: ClassVar[list["Recording"]] = []
    parameters: ClassVar[list[torch.Tensor]] = []

    def _record(self, run, memory):
        self.run, self.runs, self.graph = run, 0, self
        self.places = [one.grad for one in self.parameters]
        self.made.append(self)

    def replay(self):
        own = [one.grad for one in self.parameters]
        for one, place in zip(self.parameters, self.places, strict=True):
            one.grad = place
        self.run()
        for one, gradient in zip(self.parameters, own, strict=True):
            one.grad = gradient
        self.runs += 1


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    """The graphs that were made."""
    begin = Passes.__init__

    def watched(self, parameters, *args, **kwargs):
        begin(self, parameters, *args, **kwargs)
        Recording.parameters = self.parameters or Recording.parameters

    monkeypatch.setattr(Passes, "__init__", watched)
    monkeypatch.setattr(graphed, "PassGraph", Recording)
    monkeypatch.setattr(graphed, "GraphMemory", lambda device: SimpleNamespace())
    monkeypatch.setattr(graphed, "why_plain", lambda config, *_: "switched off" if config.cuda_graph is False else "")
    Recording.made = []
    return Recording.made


def with_and_without(directory, **settings):
    """Two distillations, as they are and with graphs; the second's result."""
    config = settings.pop("train_config", {})
    results = {}
    for name, graph in (("plain", False), ("graphed", None)):
        results[name] = distill_tiny(directory / name, train_config=short(**config, cuda_graph=graph), **settings)
    return results["graphed"]


def assert_same_adapters(directory):
    for name in ("adapter.safetensors", "checkpoint.safetensors"):
        found, expected = (read_tensors(directory / one / name)[0] for one in ("graphed", "plain"))
        assert_same_tensors(found, expected)


def assert_same_training(directory):
    assert_same_adapters(directory)
    found, expected = ([without_clock(entry) for entry in logged(directory / one)] for one in ("graphed", "plain"))
    assert found == expected


def without_clock(entry):
    return {name: value for name, value in entry.items() if name != "samples_per_second"}


WAYS = {
    "default": {},
    "cross_attention": {"adapter": small(kind="cross_attention")},
    "ema": {"train_config": {"ema": 0.9, "weight_decay": 0.1}},
    "bf16": {"train_config": {"mixed_precision": "bf16"}},
    "micro": {"train_config": {"micro_batch_size": 3}},
    "exact": {"memory": "exact"},
    "4bit": {"memory": "4bit", "train_config": {"micro_batch_size": 4}},
    "recompute": {"memory": "recompute"},
    "int8": {"base_weights": "int8"},
    "blocks": {"memory": "blocks"},
}


@pytest.mark.parametrize("name", WAYS)
def test_training_is_the_same_to_the_last_bit(tmp_path, recorded, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = with_and_without(tmp_path, **WAYS[name])
    assert_same_training(tmp_path)
    micro = WAYS[name].get("train_config", {}).get("micro_batch_size")
    runs = {None: [11], 3: [23, 11], 4: [23]}[micro]  # the first of a shape is as it is, the second both; 3 of 8 are 3, 3, 2
    assert [one.runs for one in recorded] == runs
    assert (
        result.passes == {"cuda_graph": True, "plain_because": ""} == read_json(tmp_path / "graphed" / "distill.json")["passes"]
    )
    assert read_json(tmp_path / "plain" / "distill.json")["passes"] == {"cuda_graph": False, "plain_because": "switched off"}
    assert all(parameter.grad is None for parameter in result.adapter.parameters())


def gradients(directory, sizes, most, monkeypatch):
    """Of four steps of two batches, by way, and the graphed way's Passes."""
    monkeypatch.setattr(graphed, "MOST", most)
    states = [collect_tiny(directory / str(n), labels=[n], trajectories=4 + n, seed=n) for n in (0, 1)]
    teacher = tiny_teacher()
    trained(attach(teacher, small()))
    adapter, config, accelerator = attachment_of(teacher).adapter, short(), make_accelerator("no")
    passes, found = Passes(adapter.parameters(), torch.device("cpu")), {}
    for name, one in (("plain", None), ("graphed", passes)):
        optimizer, steps = torch.optim.SGD(adapter.parameters(), 0.1), []
        before = {key: value.clone() for key, value in adapter.state_dict().items()}
        for step in range(4):
            batches = [each[torch.arange(step, step + size)] for each, size in zip(states, (3, 5), strict=True)]
            batches = batches[:: 1 if step % 2 else -1]
            with frozen(teacher.denoiser):
                loss = _gradients(Student(teacher), batches, config, accelerator, sizes, passes=one)
            steps.append({"loss": loss, **{key: value.grad.clone() for key, value in adapter.named_parameters()}})
            optimizer.step()
            optimizer.zero_grad()
        adapter.load_state_dict(before)
        found[name] = steps
    for one, other in zip(found["graphed"], found["plain"], strict=True):
        assert_same_tensors(one, other)
        assert any(value.abs().max() > 0 for value in one.values())
    return passes


@pytest.mark.parametrize(
    ("sizes", "runs"),
    [
        (2, [4 * 3 - 1, 4 * 2 - 1]),  # 2, 1 and 2, 2, 1
        (None, [1, 1]),  # both in one pass, in either order
        (4, [3, 3, 3]),  # 3 and 4, 1
    ],
)
def test_gradients_of_several_shapes_add_up_as_they_do(tmp_path, sizes, runs, monkeypatch, recorded):
    passes = gradients(tmp_path, sizes, 4, monkeypatch)
    assert sorted(one.runs for one in recorded) == sorted(runs)
    assert passes.info() == {"cuda_graph": True, "plain_because": ""}


def test_shapes_beyond_the_most_run_as_they_are(tmp_path, monkeypatch, recorded):
    """In one step before and after replays, whose gradients they add to."""
    with pytest.warns(UserWarning, match="more than 1 shapes") as warned:
        passes = gradients(tmp_path, 2, 1, monkeypatch)
    assert len(warned) == len(recorded) == 1 and recorded[0].runs > 4
    because = "more than 1 shapes of passes: the further ones run as they are"
    assert passes.info() == {"cuda_graph": True, "plain_because": because}


ERRORS = {
    "runtime": RuntimeError("operation not permitted when stream is capturing\nmore of it"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "another": ValueError("a model that looks"),
}


@pytest.mark.parametrize("at", ["_record", "replay"])
@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_recorded_runs_as_it_is_for_good(tmp_path, monkeypatch, name, at):
    tries = []

    def fail(self, *_):
        for place in (one.grad for one in self.parameters):
            place.fill_(torch.nan)  # left half done
        tries.append(name)
        raise ERRORS[name]

    monkeypatch.setattr(Recording, at, fail)
    reason = f"no graph of a pass could be made ({str(ERRORS[name]).splitlines()[0]})"
    with pytest.warns(UserWarning, match="goes on without CUDA graphs") as warned:
        result = with_and_without(tmp_path, train_config={"micro_batch_size": 3})
    assert tries == [name] and [str(one.message) for one in warned] == [f"training goes on without CUDA graphs: {reason}"]
    assert_same_training(tmp_path)
    assert result.passes == {"cuda_graph": False, "plain_because": reason}


def twice(self):
    self.run()
    self.run()


def other_loss(self):
    self.run()
    self.loss.mul_(1.02)


def one_gradient_more(self):
    self.run()
    largest = max(self.parameters, key=lambda one: float(one.grad.norm()))
    largest.grad.mul_(1.02)


def not_a_number(self):
    self.run()
    self.parameters[-1].grad.fill_(torch.nan)


@pytest.mark.parametrize("replay", [twice, other_loss, one_gradient_more, not_a_number])
def test_a_graph_that_gives_something_else_is_thrown_away(tmp_path, monkeypatch, recorded, replay):
    monkeypatch.setattr(Recording, "replay", replay)
    with pytest.warns(UserWarning, match="differ from those of the pass by") as warned:
        result = with_and_without(tmp_path)
    assert len(warned) == len(recorded) == 1
    assert_same_training(tmp_path)
    assert not result.passes["cuda_graph"] and "differ from those of the pass" in result.passes["plain_because"]


def test_rounding_in_another_order_is_no_difference(tmp_path, monkeypatch, recorded):
    def rounded(self):
        self.run()
        for one in self.parameters:
            one.grad.mul_(1.002)
        self.runs += 1

    monkeypatch.setattr(Recording, "replay", rounded)
    result = distill_tiny(tmp_path)
    assert result.passes["cuda_graph"] and recorded[0].runs == 11


def test_graphs_that_leave_the_optimizer_no_memory_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(graphed, "ROOM", 10**15)
    with pytest.warns(UserWarning, match="no graph of a pass could be made"):
        result = with_and_without(tmp_path)
    assert_same_training(tmp_path)
    assert not result.passes["cuda_graph"]


def test_validation_finds_no_graphs_and_they_are_made_again_after_it(tmp_path, monkeypatch, recorded):
    own, entered, seen = job._explained, [], []
    monkeypatch.setattr(Passes, "__enter__", lambda self: entered.append(self) or self)

    def explained(*args):
        seen.append((bool(entered[-1].trouble), entered[-1].held, len(recorded)))
        return own(*args)

    monkeypatch.setattr(job, "_explained", explained)
    with_and_without(tmp_path, validation=2, validate_every=5)
    assert_same_training(tmp_path)
    assert [count for plain, held, count in seen if not plain and not held] == [1, 2, 3]  # the last one after training
    assert [one.runs for one in recorded] == [4, 4, 1]  # of 5, 5 and 2 steps


def test_memory_that_runs_out_beside_graphs_takes_these_and_nothing_else(tmp_path, monkeypatch, recorded):
    own, falls = Recording.replay, []

    def fail(self):
        if self.runs == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        own(self)

    monkeypatch.setattr(Recording, "replay", fail)
    monkeypatch.setattr(Economy, "fall", lambda self, step: falls.append(step))
    with pytest.warns(UserWarning, match="memory ran out beside them at step 7") as warned:
        result = with_and_without(tmp_path, memory="auto")
    assert len(warned) == 1 and falls == []
    assert_same_training(tmp_path)
    reason = "memory ran out beside them at step 7 (CUDA out of memory)"
    assert result.passes == {"cuda_graph": True, "plain_because": reason}


def test_another_way_is_recorded_anew(tmp_path, monkeypatch, recorded):
    """Memory that runs out before there is a graph is another's business, and shapes are new in the way that follows."""
    teacher, fell = tiny_teacher(), []

    def fail():
        fell.append(len(recorded))
        raise torch.OutOfMemoryError("CUDA out of memory")

    after_calls(teacher.denoiser, 1, fail, training=True)
    with pytest.warns(UserWarning, match="ran out of memory at step 1; going on with"):
        result = distill_tiny(tmp_path, teacher, memory="auto")
    assert fell == [0] and result.memory["activations"] != "exact"
    assert [one.runs for one in recorded] == [11] and result.passes["cuda_graph"]


@pytest.mark.parametrize("first", [False, None])
def test_a_run_goes_on_with_the_other_setting(tmp_path, recorded, first):
    distill_tiny(tmp_path / "plain", train_config=short(cuda_graph=False))
    teacher = tiny_teacher()

    def stop():
        raise KeyboardInterrupt

    after_calls(teacher.denoiser, 8, stop, training=True)
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(tmp_path / "graphed", teacher, train_config=short(cuda_graph=first))
    assert read_tensors(tmp_path / "graphed" / "checkpoint.safetensors")[1]["step"] == "5"
    made = len(recorded)
    distill_tiny(tmp_path / "graphed", train_config=short(cuda_graph=None if first is False else False))
    assert_same_adapters(tmp_path)
    assert (made, len(recorded)) == ((0, 1) if first is False else (1, 1))


def test_parameters_without_a_gradient_stay_without(recorded):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    passes, x = Passes([used, unused], torch.device("cpu")), torch.arange(3.0)

    def run(given):
        loss = (used * given["x"]).sum()
        loss.backward()
        return loss.detach()

    for scale in (1.0, 2.0, 3.0, 4.0):
        loss = passes(run, {"x": scale * x})
        assert torch.equal(used.grad, scale * x) and unused.grad is None and loss == scale * x.sum()
        unused.grad = used.grad = None
    assert [one.runs for one in recorded] == [3]
    kept = passes(run, {"x": x})
    assert passes(run, {"x": 2 * x}) == 2 * kept == 6  # a loss outlives the next replay
    passes.release()
    assert torch.equal(used.grad, 3 * x) and not passes.held


def test_other_settings_are_other_graphs(recorded):
    weight = nn.Parameter(torch.ones(()))
    passes = Passes([weight], torch.device("cpu"))

    def run(given):
        loss = weight * given[0] * (given[1]["by"] if given[1] else 1)
        loss.backward()
        return loss.detach()

    x = torch.ones(())
    for _ in range(2):
        found = [passes(run, [x, other]) for other in ({"by": 2}, {"by": 3}, None)]
        found.append(passes(run, [x.double(), None]))
        assert [float(one) for one in found] == [2, 3, 1, 1]
    assert len(recorded) == 4 and float(weight.grad) == 14
    assert float(passes(lambda given: run([x, {"by": 5}]), [x, {"by": 2}], key="another")) == 5
    assert len(recorded) == 4


def test_gradients_of_passes_as_they_are_and_of_graphs_add_up_in_any_order(monkeypatch, recorded):
    monkeypatch.setattr(graphed, "MOST", 1)
    weight, own = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    passes = Passes([weight, own], torch.device("cpu"))

    def run(given):
        loss = (weight * given).sum() + (own if len(given) == 2 else 0)  # which no graph has a gradient of
        loss.backward()
        return loss.detach()

    one, two = torch.full((1,), 3.0), torch.full((2,), 5.0)
    for _ in range(2):
        passes(run, one)
    weight.grad = None
    for order in ((one, two), (two, one), (two, two, one, one), (one, two, one, two)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for given in order:
                passes(run, given)
        half = len(order) // 2
        assert (float(weight.grad), float(own.grad)) == (half * 13, half)
        weight.grad = own.grad = None
    assert [one.runs for one in recorded] == [1 + 6]


def test_what_is_not_finite_is_not_compared(recorded):
    weight = nn.Parameter(torch.ones(()))
    passes = Passes([weight], torch.device("cpu"))

    def run(given):
        loss = weight * given
        loss.backward()
        return loss.detach()

    for value in (1.0, torch.inf, torch.nan):
        passes(run, torch.tensor(value))
        weight.grad = None
    assert not recorded and not passes.trouble
    passes(run, torch.tensor(2.0))
    assert [one.runs for one in recorded] == [1] and weight.grad == 2


def test_weights_that_a_pass_moves_are_brought_back(recorded, monkeypatch):
    monkeypatch.setattr(Recording, "_record", lambda self, run, memory: run())  # as Python runs in a recording
    weight, base = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), 3.0), requires_grad=False)
    passes = Passes([weight], torch.device("cpu"))
    passes.weights = [base]

    def moving(x):
        base.data = base.data.clone()
        (weight * base * x).backward()
        return x.detach()

    passes(moving, torch.tensor(1.0))
    weight.grad, place = None, base.data_ptr()
    with pytest.warns(UserWarning, match="a pass gives the model's weights other memory"):
        passes(moving, torch.tensor(2.0))
    assert passes.trouble and not passes.held and weight.grad == 6 and place != 0


CARD = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"config": TrainConfig(cuda_graph=True)}, ""),
        ({"config": TrainConfig(cuda_graph=False)}, "TrainConfig(cuda_graph=False)"),
        ({"device": torch.device("cpu")}, "no CUDA device, but cpu"),
        ({"num_processes": 2}, "2 processes"),
        ({"scaler": object()}, "gradients are scaled"),
        ({"weights": [CARD, torch.device("cpu")]}, "not all of the model is on cuda:0"),
        ({"modules": [("", SimpleNamespace(_hf_hook=1))]}, "a hook of accelerate or diffusers moves or casts the model"),
        (
            {"modules": [("a", SimpleNamespace(_diffusers_hook=SimpleNamespace(hooks={"layerwise_casting": 1})))]},
            "a hook of accelerate or diffusers moves or casts a",
        ),
    ],
)
def test_where_passes_run_as_they_are(changed, reason):
    on = {"config": TrainConfig(), "device": CARD, "num_processes": 1, "scaler": None, "weights": [CARD], **changed}
    weights = [SimpleNamespace(device=device) for device in on.pop("weights")]
    modules = on.pop("modules", [("", SimpleNamespace())])
    model = SimpleNamespace(parameters=lambda: weights, buffers=list, named_modules=lambda: modules)
    assert why_plain(on.pop("config"), SimpleNamespace(**on), model) == reason


def test_without_a_card_nothing_is_said(tmp_path, monkeypatch, recorded):
    monkeypatch.setattr(graphed, "why_plain", why_plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = distill_tiny(tmp_path)
    assert not recorded and result.passes == {"cuda_graph": False, "plain_because": "no CUDA device, but cpu"}
