"""Distilling in less memory: the same adapter, from micro-batches, over packed weights, one model at a time on the card."""

import copy
import json
from collections import Counter
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from torch import nn
from torch.optim import AdamW
from typer.testing import CliRunner

import agd_fast as agd
from agd_fast.attaching import armed, attach, attachment_of
from agd_fast.cli import app
from agd_fast.distillation import TrainConfig, job, residency
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.passes import few_at_once
from agd_fast.distillation.residency import Residency
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import _gradients, _leave_packed_weights, make_accelerator
from agd_fast.files import fingerprint, read_json
from agd_fast.freezing import frozen
from agd_fast.memory.base_weights import PackedBase, PackedWeight, packed_base
from agd_fast.memory.choose import USABLE, Way, choose, ways_of
from agd_fast.memory.estimate import MemoryRow
from agd_fast.memory.optimizer import HostAdamW
from agd_fast.memory.weight_codes import pack_weight
from agd_fast.spec import forward_parameters
from agd_fast.trajectories import Trajectories, collect
from conftest import assert_as_exact, trained
from helpers_distillation import (
    assert_same_tensors,
    collect_tiny,
    contents,
    distill_tiny,
    logged,
    short,
    small,
    tiny_teacher,
)
from helpers_families import denoisers, exact_output, run, spec_for, watched
from tiny import FAMILIES

MODES = ("exact", "8bit", "4bit", "recompute")
SD15 = FAMILIES["sd15"]


def wide_teacher():
    """With activations that are large enough to be packed."""
    return tiny_teacher(width=64)


def distill_pipe(pipe, directory, **changes):
    settings = {
        "inputs": SD15.inputs(3),
        "call": {"height": 16, "width": 16},
        "guidance_range": (1.0, 6.0),
        "adapter": agd.AdapterConfig(hidden=2),
        "trajectories": 4,
        "sampling_steps": 2,
        "shard_size": 2,
        "train_config": TrainConfig(steps=4, batch_size=4, log_every=2, checkpoint_every=2),
        "validation": 0,
        "progress": False,
    }
    return agd.distill(pipe, output_dir=directory, **{**settings, **changes})


@pytest.mark.parametrize("size", [1, 2, 3, 8, 99])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(tmp_path, size):
    """Of states of two shapes, in float64: no digit of the sum is lost to their order."""
    states = [collect_tiny(tmp_path / str(n), labels=[n], trajectories=2 + n)[torch.arange(3 + 2 * n)] for n in (0, 1)]
    teacher = tiny_teacher()
    trained(attach(teacher, small()))
    teacher.denoiser.double()
    adapter = attachment_of(teacher).adapter.double()
    config, accelerator, found = short(), make_accelerator("no"), {}
    for name, count in (("whole", None), ("micro", size)):
        with frozen(teacher.denoiser):
            loss = _gradients(Student(teacher), states, config, accelerator, count)
        found[name] = {"loss": loss.double(), **{n: p.grad for n, p in adapter.named_parameters()}}
        adapter.zero_grad()
    for name, expected in found["whole"].items():
        eps = torch.finfo(torch.float32 if name == "loss" else torch.float64).eps  # the loss is float32, and its gradient
        scale = expected.abs().max()
        assert scale > 0
        assert (found["micro"][name] - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * scale, (name, eps)


def test_micro_batches_are_the_whole_memory_of_a_step(tmp_path):
    sizes, teacher = Counter(), tiny_teacher()
    sizes_of(teacher.denoiser, "hidden_states", sizes)
    distill_tiny(tmp_path / "micro", teacher, train_config=short(micro_batch_size=3))
    assert {key: count for key, count in sizes.items() if key[1]} == {(3, True): 24, (2, True): 12}
    distill_tiny(tmp_path / "whole")
    micro, whole = ([entry["loss"] for entry in logged(tmp_path / name)] for name in ("micro", "whole"))
    assert micro == pytest.approx(whole, rel=1e-5) and micro != [0.0]


def test_a_run_goes_on_with_another_micro_batch_but_no_other_way_to_save_memory(tmp_path):
    distill_tiny(tmp_path, memory="4bit", base_weights="int8", train_config=short(steps=10))
    distill_tiny(tmp_path, memory="4bit", base_weights="int8", train_config=short(steps=10, micro_batch_size=2))
    for change, message in (
        ({"memory": "8bit"}, "memory: expected '8bit', found '4bit'"),
        ({"base_weights": None}, "base_weights"),
    ):
        with pytest.raises(ValueError, match=message):
            distill_tiny(tmp_path, **{"memory": "4bit", "base_weights": "int8", "train_config": short(steps=10), **change})


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


@pytest.mark.parametrize("memory", MODES)
def test_what_was_used_is_written_down(tmp_path, memory):
    result = distill_tiny(tmp_path, wide_teacher(), memory=memory, base_weights="int8")
    written = read_json(tmp_path / "distill.json")["memory"]
    assert written == result.memory
    way = f"activations {memory}, base in int8"
    assert written == {
        "memory": memory,
        "way": way,
        "activations": memory,
        "base_weights": "int8",
        "micro_batch_size": None,
        "reason": "as asked for",
    }
    assert read_json(tmp_path / "adapter_config.json")["about"]["memory"] == way
    from agd_fast.reporting.card import model_card

    assert way in model_card([tmp_path], "me/adapter")
    assert distill_tiny(tmp_path / "plain").memory is None
    assert "memory" not in read_json(tmp_path / "plain" / "distill.json")


def test_auto_on_the_cpu_is_exact(tmp_path):
    states = collect_tiny(tmp_path / "states", wide_teacher(), trajectories=6)
    results = {
        name: distill_tiny(tmp_path / name, wide_teacher(), trajectories=states, memory=name) for name in ("auto", "exact")
    }
    assert (
        contents(tmp_path / "auto")["checkpoint.safetensors"] != contents(tmp_path / "exact")["checkpoint.safetensors"]
    )  # settings
    assert_same_tensors(results["auto"].adapter.state_dict(), results["exact"].adapter.state_dict())
    assert results["auto"].memory["reason"] == "activations exact, for there is no card to fit"


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "2bit"}, "memory .*'exact', '8bit', '4bit', 'recompute', 'auto'.*'2bit'"),
        ({"base_weights": "int4"}, "base_weights .*'int8', 'nf4'.*'int4'"),
    ],
)
def test_an_unknown_name_is_said_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


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


class Full:
    """Raises where a device is full, in some of the student's forwards."""

    def __init__(self, monkeypatch, *failing):
        self.count, self.failing = 0, failing
        forward = Student.forward

        def counted(student, batches):
            self.count += 1
            if self.count in self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(student, batches)

        monkeypatch.setattr(Student, "forward", counted)


@pytest.mark.parametrize("base_weights", [None, "int8"])
def test_auto_takes_the_next_way_once_and_goes_on_without_harm(tmp_path, monkeypatch, base_weights):
    """The states of a tiny model are too small to be packed, so that every mode gives the same adapter bit for bit, if a failed
    step leaves nothing behind: in its second micro-batch a gradient is there already."""
    config = short(micro_batch_size=4, ema=0.9)
    whole = distill_tiny(tmp_path / "whole", memory="auto", base_weights=base_weights, train_config=config)
    full = Full(monkeypatch, 10)  # step 5
    with pytest.warns(UserWarning, match="activations exact.* ran out of memory at step 5; going on with activations 8bit"):
        found = distill_tiny(tmp_path / "run", memory="auto", base_weights=base_weights, train_config=config)
    assert full.count == 12 * 2 + 2
    assert_same_tensors(found.adapter.state_dict(), whole.adapter.state_dict())
    assert [e["loss"] for e in logged(tmp_path / "run")] == [e["loss"] for e in logged(tmp_path / "whole")]
    assert found.memory["activations"] == "8bit" and "after activations exact" in found.memory["reason"]
    assert "ran out of memory at step 5" in read_json(tmp_path / "run" / "distill.json")["memory"]["reason"]


@pytest.mark.filterwarnings("ignore:.*ran out of memory")
@pytest.mark.parametrize(
    ("memory", "failing", "step"), [("auto", (10, 12), 11), ("auto", (3, 4), 3), ("4bit", (2,), 2), (None, (1,), 1)]
)
def test_without_another_way_the_error_names_what_may_help(tmp_path, monkeypatch, memory, failing, step):
    teacher = tiny_teacher()
    base = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    Full(monkeypatch, *failing)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        distill_tiny(tmp_path, teacher, memory=memory, base_weights="int8")
    message = str(caught.value)
    for part in (
        f"at step {step} with",
        "Tried to allocate 2.00 GiB",
        *map(repr, MODES),
        "base_weights='int8'",
        "micro_batch_size",
    ):
        assert part in message
    assert attachment_of(teacher) is None
    assert_same_tensors(teacher.denoiser.state_dict(), base)
    assert "forward" not in vars(teacher.denoiser)
    assert all(p.grad is None for p in teacher.denoiser.parameters())


SIZES = {"exact": 100, "8bit": 60, "4bit": 40, "recompute": 20}


def row(way):
    """Weights and the like take 50, in int8 25; activations by mode; a fifth of them again for a moment."""
    activations = SIZES[way.activations]
    return MemoryRow(way.activations, 25 if way.base_weights else 50, 0, 0, 0, activations, activations // 5, {})


@pytest.mark.parametrize(
    ("budget", "batch", "way"),
    [
        (50 + 120, 4, Way("exact", None, 1)),
        (50 + 240, 4, Way("exact", None, 2)),
        (50 + 239, 4, Way("exact", None, 1)),
        (50 + 5000, 4, Way("exact", None, 4)),
        (50 + 119, 4, Way("8bit", None, 1)),
        (50 + 71, 4, Way("4bit", None, 1)),
        (50 + 47, 1, Way("recompute", None, 1)),
        (25 + 48, 4, Way("recompute", "int8", 2)),
        (25 + 23, 4, Way("recompute", "int8", 1)),
    ],
)
def test_auto_takes_the_first_mode_that_fits_and_as_many_states_as_fit(budget, batch, way):
    choice = choose(ways_of("auto", None, None), -(-budget * 1000 // int(USABLE * 1000)), batch, row)
    assert choice.ways[0] == way
    tried = [(left.activations, left.base_weights) for left in choice.ways]
    assert tried == [*zip(MODES, [None] * 4, strict=True), ("recompute", "int8")][-len(tried) :]
    assert str(way) in choice.reason


def test_auto_says_why(monkeypatch):
    import agd_fast.memory.choose as room

    monkeypatch.setattr(room, "_GIB", 1)
    choice = choose(ways_of("auto", None, None), 150, 8, row)
    assert choice.reason == "activations 8bit, 1 state a forward: 122.00 of 150.00 GiB; activations exact would take 170.00"
    least = choose(ways_of("auto", "nf4", None), 50, 8, row)
    assert least.ways == (Way("recompute", "nf4", 1),)
    assert least.reason.startswith("activations recompute, base in nf4, 1 state a forward, the least there is, though")


def test_auto_keeps_to_what_was_asked_for():
    choice = choose(ways_of("auto", "int8", 3), 400, 8, row)
    assert choice.ways[0] == Way("8bit", "int8", 3)
    assert {(left.base_weights, left.micro_batch_size) for left in choice.ways} == {("int8", 3)}
    assert choose(ways_of("auto", None, 99), 10**6, 8, row).ways[0] == Way("exact", None, 99)


def test_auto_on_a_card_estimates_the_largest_states(tmp_path, monkeypatch):
    """The estimate is of the real denoiser with its adapter and of a state of the trajectories."""
    seen = []

    def budget(device, resident):
        seen.append(resident)
        return 10 * resident

    monkeypatch.setattr(job, "budget_on", budget)
    monkeypatch.setattr(job.Residency, "of", classmethod(lambda cls, teacher, *_: cls(teacher, torch.device("cpu"))))
    choice_of = job._choice
    monkeypatch.setattr(job, "_choice", lambda j, states, _, is_short: choice_of(j, states, torch.device("cuda"), is_short))
    teacher = wide_teacher()
    weights = sum(value.nbytes for value in teacher.denoiser.state_dict().values())
    result = distill_tiny(tmp_path, teacher, memory="auto")
    assert seen[0] == weights + sum(value.nbytes for value in result.adapter.state_dict().values())
    assert result.memory["activations"] == "exact" and 1 <= result.memory["micro_batch_size"] <= 8


def sizes_of(denoiser, name, seen):
    """Let the batch of every forward be counted by whether it keeps a history; name: of its argument x."""
    first = forward_parameters(denoiser)[0]

    def note(_, args, kwargs):
        x = {**dict(zip((first,), args, strict=False)), **kwargs}[name]
        seen[len(x), torch.is_grad_enabled()] += 1

    return denoiser.register_forward_pre_hook(note, with_kwargs=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_forwards_of_one_sample_give_what_one_of_all_gives(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    with watched(pipe) as found:
        run(pipe, family, **family.guided)
    for component, denoiser in denoisers(pipe).items():
        whole = next(forward for step in found.steps for forward in step if forward.component == component)
        seen, spec = Counter(), spec_for(pipe)
        with torch.no_grad(), few_at_once(denoiser, spec, 1):
            handle = sizes_of(denoiser, spec.sample, seen)
            output = denoiser(**whole.arguments)
            handle.remove()
        output = output if isinstance(output, torch.Tensor) else output[0]
        output = torch.stack(output) if isinstance(output, list) else output
        assert seen == {(1, False): whole.size} and whole.size > 1
        assert_as_exact(output, whole.output, exact_output(denoiser, whole))
        assert denoiser._compiled_call_impl is None


def test_forwards_in_parts_are_armed_with_their_own_samples_omega():
    teacher = tiny_teacher()
    trained(attach(teacher, small()))
    conditions = {"class_labels": torch.tensor([0, 1, 2])}
    x, t, omega = torch.randn(3, 1, 4, 4), torch.tensor([900, 500, 20]), torch.tensor([1.5, 3.0, 6.0])
    with torch.no_grad():
        whole = teacher.predict_agd(x, t, conditions, omega)
        with few_at_once(teacher.denoiser, teacher.spec, 2):
            parts = teacher.predict_agd(x, t, conditions, omega)
            one = teacher.predict_agd(x[:1], t[:1], {"class_labels": torch.tensor([0])}, omega[:1])
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(one, teacher.predict_agd(x[:1], t[:1], {"class_labels": torch.tensor([0])}, omega[2:]))
    with few_at_once(teacher.denoiser, teacher.spec, 1), armed(attachment_of(teacher), omega):
        sizes = []
        handle = teacher.denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["timestep"])), with_kwargs=True
        )
        teacher.predict(x, t, conditions)  # with gradients: a whole one
        handle.remove()
    assert sizes == [3]


CARD = torch.device("cpu:0")  # an accelerator to whoever compares devices; tensors on it are on the CPU


class Placed:
    """Where models are, by what their `to` was called with, and who else was on the card in each forward."""

    def __init__(self, monkeypatch, pipe, home):
        self.modules = {name: one for name, one in pipe.components.items() if isinstance(one, nn.Module)}
        self.where = dict.fromkeys(self.modules, home)
        self.forwards = Counter()
        to, pre_forward = nn.Module.to, accelerate.hooks.CpuOffload.pre_forward

        def moved(module, *args, **kwargs):
            for name, one in self.modules.items():
                if one is module:
                    self.where[name] = torch.device(args[0] if args else kwargs["device"])
            return to(module, *args, **kwargs)

        def offloading(hook, module, *args, **kwargs):
            if hook.prev_module_hook is not None:  # accelerate asks the tensors, which are on the CPU always
                hook.prev_module_hook.offload()
            return pre_forward(hook, module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "to", moved)
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", offloading)
        monkeypatch.setattr(residency, "device_of", lambda module: self.where[self._name(module)])
        for name, module in self.modules.items():
            for child in module.modules():  # a VAE decodes without a forward of its own; embedders of a UNet are asked for widths
                if not list(child.children()) and (name != "unet" or child is module.conv_in):
                    child.register_forward_pre_hook(lambda *_, name=name: self._note(name))

    def _name(self, module):
        return next(name for name, one in self.modules.items() if one is module)

    def _note(self, name):
        others = frozenset(other for other, device in self.where.items() if device == CARD and other != name)
        self.forwards[name, torch.is_grad_enabled(), self.where[name] == CARD, others] += 1


@pytest.mark.parametrize("home", [torch.device("cpu"), CARD])
def test_only_the_model_that_runs_is_on_the_card(tmp_path, monkeypatch, home):
    pipe = SD15.pipeline()
    before = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
    placed = Placed(monkeypatch, pipe, home)
    of = Residency.of.__func__
    monkeypatch.setattr(Residency, "of", classmethod(lambda cls, teacher, device, *rest: of(cls, teacher, CARD, *rest)))
    distill_pipe(pipe, tmp_path, memory="4bit", base_weights="int8", validation=1, validate_every=2)
    probe = {key: count for key, count in placed.forwards.items() if key[0] == "text_encoder" and key[3]}
    if home == CARD:  # before anything is distilled, a call of the pipeline tells its shapes
        assert probe
        for key in probe:
            del placed.forwards[key]
    found = {(name, grad) for name, grad, *_ in placed.forwards}
    assert found == {("text_encoder", False), ("unet", False), ("unet", True), ("vae", False)}
    for name, grad, on_card, others in placed.forwards:
        assert (on_card or (home != CARD and name == "text_encoder")) and not others, (name, grad, on_card, others)
    assert set(placed.where.values()) == {home}
    assert {name: value for name, value in vars(pipe).items() if name.startswith("_") and name in before} == before
    assert not getattr(pipe, "_all_hooks", None)
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules.values())


def test_guidance_is_two_forwards_of_one_sample_each(tmp_path):
    sizes = {}
    for memory in (None, "exact"):
        pipe, sizes[memory] = SD15.pipeline(), Counter()
        sizes_of(pipe.unet, "sample", sizes[memory])
        distill_pipe(pipe, tmp_path / str(memory), memory=memory, train_config=TrainConfig(steps=2, batch_size=4))
    assert sizes[None] == {(4, False): 4, (4, True): 2}
    assert sizes["exact"] == {(1, False): 16, (4, True): 2}
    plain, parts = (Trajectories(tmp_path / name / "trajectories") for name in ("None", "exact"))
    for one, other in zip(plain.shards, parts.shards, strict=True):
        assert torch.equal(other["condition"], one["condition"])
        for name in ("sample", "target"):
            torch.testing.assert_close(other[name], one[name])


def test_a_pipeline_that_is_offloaded_goes_on_so(tmp_path):
    pipe = SD15.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = len(pipe._all_hooks)
    distill_pipe(pipe, tmp_path, memory="4bit")
    assert len(pipe._all_hooks) == hooks > 0


def test_states_are_read_from_disk_as_they_are_needed(tmp_path):
    """Nothing of a shard is in memory but pages that the system may drop: its tensors are those of the mapped file."""
    states = collect_tiny(tmp_path)
    for shard in states.shards:
        for tensor in shard.values():
            assert not tensor.is_pinned()
            if tensor.numel():
                assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    file = next(tmp_path.glob("shard-*.safetensors"))
    assert str(file) in Path("/proc/self/maps").read_text()


def test_the_command_line_saves_memory(tmp_path):
    arguments = [
        "distill",
        "--output",
        tmp_path,
        "--steps",
        2,
        "--batch-size",
        4,
        "--trajectories",
        2,
        "--validation",
        0,
        "--quiet",
    ]
    arguments += ["--memory", "auto", "--base-weights", "int8", "--micro-batch-size", 3]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "distill.json").read_text())["memory"] | {"reason": ""} == {
        "memory": "auto",
        "way": "activations exact, base in int8, 3 states a forward",
        "activations": "exact",
        "base_weights": "int8",
        "micro_batch_size": 3,
        "reason": "",
    }
