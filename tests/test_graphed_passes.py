"""Passes of training as CUDA graphs, of which `helpers_graphed` makes what a CPU can run: what becomes one, and what it gives."""

import re
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attach, attachment_of
from agd_fast.distillation import TrainConfig, graphed, job
from agd_fast.distillation.graphed import Passes, why_plain
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import _gradients, make_accelerator
from agd_fast.files import read_json, read_tensors
from agd_fast.freezing import frozen
from conftest import trained
from helpers_distillation import after_calls, assert_same_tensors, collect_tiny, distill_tiny, short, small, tiny_teacher
from helpers_families import to_distil
from helpers_graphed import Recording, assert_same_adapters, assert_same_training, with_and_without
from tiny import FAMILIES

pytestmark = pytest.mark.usefixtures("recorded")


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
    runs = {None: [11], 3: [21, 11], 4: [21]}[micro]  # the first batch is as it is, the second both; 3 of 8 are 3, 3, 2
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
        (2, [1 + 2 * 3, 1 + 2 * 2]),  # 2, 1 and 2, 2, 1
        (None, [3, 3]),  # each by itself, in either order
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
def test_a_run_goes_on_with_the_other_setting(tmp_path, monkeypatch, recorded, first):
    distill_tiny(tmp_path / "plain", train_config=short(cuda_graph=False))
    teacher, replay = tiny_teacher(), Recording.replay

    def stop():
        raise KeyboardInterrupt

    if first is False:
        after_calls(teacher.denoiser, 8, stop, training=True)
    else:
        monkeypatch.setattr(Recording, "replay", lambda self: stop() if self.runs == 6 else replay(self))
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(tmp_path / "graphed", teacher, train_config=short(cuda_graph=first))
    assert read_tensors(tmp_path / "graphed" / "checkpoint.safetensors")[1]["step"] == "5"
    made = len(recorded)
    monkeypatch.setattr(Recording, "replay", replay)
    distill_tiny(tmp_path / "graphed", train_config=short(cuda_graph=None if first is False else False))
    assert_same_adapters(tmp_path)
    assert (made, len(recorded)) == ((0, 1) if first is False else (1, 1))


def test_graphs_are_made_when_the_passes_of_a_batch_are_done(tmp_path, monkeypatch, recorded):
    """No pass as it is then needs memory beside theirs: not of the left-over micro-batch either."""
    teacher, forwards, before = tiny_teacher(), [], []
    teacher.denoiser.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    record = Recording._record
    monkeypatch.setattr(Recording, "_record", lambda self, *given: (before.append(sum(forwards)), record(self, *given)))
    distill_tiny(tmp_path, teacher, train_config=short(micro_batch_size=3))
    assert before == [6, 7]  # 3, 3, 2 twice, and a replay of the first


def test_a_batch_with_a_new_shape_makes_no_graphs(monkeypatch, recorded):
    """Nor does it try to, as soon as it has one."""
    weight, tried = nn.Parameter(torch.ones(())), []
    passes, known, own = Passes([weight], torch.device("cpu")), [], Passes._tried
    monkeypatch.setattr(
        Passes, "_tried", lambda self, run, given, key: (tried.append(len(given[0])), own(self, run, given, key))[1]
    )

    def run(given):
        loss = (weight * given).sum()
        loss.backward()
        return loss.detach()

    for batch in ([1], [1, 2], [3, 1, 2], [2, 1, 2], [1, 2, 3], [1, 3]):
        assert sum(passes(run, torch.ones(size)) for size in batch) == weight.grad == sum(batch)
        passes.end_batch()
        assert weight.grad == sum(batch)
        weight.grad = None
        known.append([len(one.tensors[0]) for one in recorded])
    assert known == [[], [], [], [2, 1], [2, 1, 3], [2, 1, 3]]
    assert [one.runs for one in recorded] == [1 + 1, 1 + 2, 1 + 1] and tried == [1, 2, 1, 3]


def test_parameters_without_a_gradient_stay_without(recorded):
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    passes, x = Passes([used, unused], torch.device("cpu")), torch.arange(3.0)

    def run(given):
        loss = (used * given["x"]).sum()
        loss.backward()
        return loss.detach()

    for scale in (1.0, 2.0, 3.0, 4.0):
        loss = passes(run, {"x": scale * x})
        passes.end_batch()
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
        passes.end_batch()
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
        passes.end_batch()
    weight.grad = None
    for order in ((one, two), (two, one), (two, two, one, one), (one, two, one, two)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for given in order:
                passes(run, given)
            passes.end_batch()
        half = len(order) // 2
        assert (float(weight.grad), float(own.grad)) == (half * 13, half)
        weight.grad = own.grad = None
    assert [one.runs for one in recorded] == [1 + 6]


VALUES, HOST = "a tensor's values are read", "aten::lift_fresh"  # lengths; numbers that come from the host
AS_THEY_ARE = {
    "bria_fibo2": VALUES,
    "chroma": HOST,
    "hidream": HOST,
    "hunyuan_image": "aten::index",  # by a mask
    "hunyuanvideo15": "aten::_local_scalar_dense",
    "lumina2": VALUES,
    "mochi": "aten::nonzero",
    "nucleusmoe_image": VALUES,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_whose_passes_become_graphs(name, tmp_path, recorded):
    family = FAMILIES[name]
    pipe = family.pipeline()
    reason = f"no graph of a pass could be made (operation not permitted when stream is capturing: {AS_THEY_ARE.get(name)})"
    with pytest.warns(UserWarning, match=re.escape(reason)) if name in AS_THEY_ARE else nullcontext():
        result = agd.distill(
            pipe,
            output_dir=tmp_path,
            **to_distil(pipe, family),
            adapter=agd.AdapterConfig(hidden=4),
            trajectories=6,
            sampling_steps=2,
            train_config=TrainConfig(steps=5, batch_size=4),
            validation=0,
            progress=False,
        )
    for one in (result, *result.others.values()):
        assert one.passes["cuda_graph"] == (name not in AS_THEY_ARE)
        assert name not in AS_THEY_ARE or one.passes["plain_because"] == reason
    assert len(recorded) > len(result.others) or name in AS_THEY_ARE


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
        ({"modules": [("", SimpleNamespace(_hf_hook=1))]}, "accelerate's int acts on the model"),
        (
            {"modules": [("a", SimpleNamespace(_diffusers_hook=SimpleNamespace(hooks={"layerwise_casting": 1})))]},
            "diffusers' hook 'layerwise_casting' acts on a",
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
