"""Distilling over activations and weights as codes: the same adapter, and the base as it was."""

import gc
import weakref

import pytest
import torch
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attach, attachment_of
from agd_fast.distillation import TrainConfig, job
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import _leave_packed_weights
from agd_fast.files import fingerprint, read_json
from agd_fast.freezing import frozen
from agd_fast.memory import base_weights
from agd_fast.memory.base_weights import PackedBase, PackedWeight, packed_base
from agd_fast.memory.weight_codes import pack_weight
from agd_fast.trajectories import collect
from helpers_distillation import assert_same_tensors, distill_tiny, logged, small, tiny_teacher
from helpers_memory import wide_teacher


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Guided trajectories of the shipped teacher, and some that are held out."""
    teacher = agd.datasets.digits_teacher()
    return [
        collect(
            teacher,
            teacher.conditions(range(10)),
            tmp_path_factory.mktemp("digits"),
            trajectories=count,
            steps=(8, 12),
            seed=seed,
            progress=False,
        )
        for seed, count in ((0, 40), (1, 20))
    ]


def held_out_loss(teacher, states):
    batch = states[torch.arange(len(states))]
    with torch.no_grad():
        prediction = teacher.predict_agd(batch.sample, batch.timestep, batch.conditions, batch.omega)
    return float(distillation_loss(prediction, batch.target, batch.omega, "l2", "omega"))


def test_a_distillation_in_4_bits_ends_where_the_exact_one_does(digits, tmp_path):
    """Within 2 % of its held-out loss, and far below where both began."""
    fresh, losses = agd.datasets.digits_teacher(), {}
    attach(fresh, agd.AdapterConfig())
    for memory in ("exact", "4bit"):
        teacher, config = agd.datasets.digits_teacher(), TrainConfig(steps=60, batch_size=48)
        fixed = {"class_labels": range(10), "trajectories": digits[0], "validation": 0, "progress": False}
        result = agd.distill(teacher, output_dir=tmp_path / memory, train_config=config, memory=memory, **fixed)
        assert result.memory["activations"] == memory
        losses[memory] = held_out_loss(teacher, digits[1])
    assert losses["exact"] < held_out_loss(fresh, digits[1]) / 2
    assert losses["4bit"] != losses["exact"]
    assert losses["4bit"] == pytest.approx(losses["exact"], rel=0.02)


def test_no_codes_are_left_while_the_base_is_measured(tmp_path, monkeypatch):
    made, seen, pack, explained = [], [], base_weights._packed, job._explained

    def packed(*args):
        found = pack(*args)
        made.append(weakref.ref(found.codes))
        return found

    def alive(*args):
        gc.collect()
        seen.append((len(made), sum(one() is not None for one in made)))
        return explained(*args)

    monkeypatch.setattr(base_weights, "_packed", packed)
    monkeypatch.setattr(job, "_explained", alive)
    distill_tiny(tmp_path, base_weights="int8", validation=2, validate_every=5)
    assert [left for count, left in seen if count] == [0, 0, 0]  # twice in training, once after it


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_base_comes_back_bit_for_bit(tmp_path, kind):
    teacher, seen = wide_teacher(), []
    base = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    parameters = dict(teacher.denoiser.named_parameters())
    layer = teacher.denoiser.transformer_blocks[0].ff.net[2]
    layer.register_forward_pre_hook(lambda module, _: seen.append((torch.is_grad_enabled(), type(module.weight))))
    distill_tiny(tmp_path / "run", teacher, base_weights=kind, validation=2, validate_every=6)
    assert set(seen) == {
        (True, PackedWeight),
        (False, nn.Parameter),
    }  # what is collected and measured is of the weights as they are
    agd.unload(teacher)

    def fail(*_):
        if torch.is_grad_enabled():
            raise KeyboardInterrupt

    layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(tmp_path / "stopped", teacher, base_weights=kind)
    assert_same_tensors(teacher.denoiser.state_dict(), base)
    assert all(parameters[name] is p and p.requires_grad for name, p in teacher.denoiser.named_parameters())
    assert attachment_of(teacher) is None


class CodedLinear(nn.Module):
    """As libraries keep a quantised linear: codes of 8 bits as a parameter, the scale beside it."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def coded(block):
    for parent, name in ((block.attn1, "to_q"), (block.attn1, "to_k"), (block.attn1.to_out, "0"), (block.ff.net, "2")):
        setattr(parent, name, CodedLinear(getattr(parent, name)))


def wrapped(block):
    """As torchao keeps them: weights that are tensors made of others."""
    PackedBase(block.requires_grad_(False), "nf4").pack()


@pytest.mark.parametrize("settings", [{}, {"memory": "4bit"}, {"memory": "recompute", "base_weights": "int8"}])
@pytest.mark.parametrize("quantise", [coded, wrapped])
def test_a_base_quantised_by_another_library_stays_as_it_is(tmp_path, quantise, settings):
    teacher = wide_teacher()
    quantise(teacher.denoiser.transformer_blocks[0])
    parameters = dict(teacher.denoiser.named_parameters())
    before = fingerprint(teacher.denoiser.state_dict())
    result = distill_tiny(tmp_path, teacher, **settings)
    assert all(parameters[name] is p for name, p in teacher.denoiser.named_parameters())
    assert fingerprint(teacher.denoiser.state_dict()) == before
    assert read_json(tmp_path / "trajectories" / "manifest.json")["plan"]["model"]["hash"] == before
    assert result.loss < logged(tmp_path)[0]["loss"] / 2


def test_the_hash_of_a_quantised_weight_is_that_of_its_codes(monkeypatch):
    """Which other libraries' weights have no other way to be read."""
    monkeypatch.delattr(PackedWeight, "unpacked")
    shape, weights = torch.Size((4, 64)), []
    for value in (1.0, 1.0, 2.0):
        weights.append(PackedWeight(*pack_weight(torch.full(shape, value), "int8"), "int8", shape, torch.float32))
    first, same, other = (fingerprint({"weight": weight}) for weight in weights)
    assert first == same != other
    weights[1].codes[0, 0] -= 1
    assert fingerprint({"weight": weights[1]}) != first


def test_packed_weights_are_not_sent_to_other_processes():
    teacher = wide_teacher()
    attach(teacher, small())
    with frozen(teacher.denoiser), packed_base(teacher.denoiser, "int8"):
        student = Student(teacher)
        _leave_packed_weights(student)
        packed = {name for name, value in student.named_parameters() if isinstance(value, PackedWeight)}
    assert set(student._ddp_params_and_buffers_to_ignore) == packed  # what DDP reads
    assert "denoiser.transformer_blocks.0.attn1.to_q.weight" in packed and not any("adapter" in name for name in packed)


def test_a_teacher_computes_in_the_dtype_of_its_weights_not_of_their_codes():
    teacher = tiny_teacher()
    teacher.denoiser.register_parameter("codes", nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False))
    teacher.denoiser._parameters = dict(reversed(teacher.denoiser._parameters.items()))
    assert next(teacher.denoiser.parameters()).dtype == torch.uint8
    assert teacher.dtype == torch.float32
