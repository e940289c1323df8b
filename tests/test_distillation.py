"""agd_fast.distill: what is trained, on what, and what comes out."""

import itertools
import json
import math
import socket
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline, EulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.checkpoint import load_checkpoint, save_checkpoint
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import batch_rows
from agd_fast.evaluation.explained import guidance_explained
from agd_fast.files import fingerprint, read_json, read_tensors
from agd_fast.freezing import frozen
from agd_fast.trajectories import Trajectories, collect
from helpers_distillation import (
    assert_same_tensors,
    contents,
    custom_teacher,
    ddim,
    distill_tiny,
    dit,
    in_children,
    short,
    small,
    tiny_teacher,
    unet,
)


def logged(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


class Spoiled(Trajectories):
    """Trajectories whose target is `value` in one batch."""

    def __init__(self, directory, step, value):
        super().__init__(directory)
        self.left, self.value = step, value

    def batches(self, rows):
        batches = super().batches(rows)
        self.left -= 1
        if self.left == 0:
            batches[0].target[0, 0, 0, 0] = self.value
        return batches


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A hundred guided trajectories of the shipped teacher."""
    teacher = agd.datasets.digits_teacher()
    folder = tmp_path_factory.mktemp("digits")
    return collect(teacher, teacher.conditions(range(10)), folder, trajectories=100, steps=(8, 12), progress=False)


# measured with two seeds each: modulation .81, .82; offset .23, .25; cross_attention .38, .36
@pytest.mark.parametrize(("kind", "steps", "bar"), [("modulation", 150, 0.7), ("offset", 80, 0.1), ("cross_attention", 80, 0.2)])
def test_distill_explains_guidance(digits, tmp_path, kind, steps, bar):
    teacher = agd.datasets.digits_teacher()
    base = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    result = agd.distill(
        teacher,
        class_labels=range(10),
        output_dir=tmp_path,
        adapter=agd.AdapterConfig(kind=kind),
        train_config=TrainConfig(steps=steps),
        trajectories=digits,
        sampling_steps=(8, 12),
        validation=20,
        progress=False,
    )
    assert result.explained.mean > bar
    assert set(result.explained.by_scale) == {1.5, 2.0, 3.0, 4.0, 6.0}
    assert result.fraction <= 0.05
    assert attachment_of(teacher).adapter is result.adapter
    assert read_json(tmp_path / "distill.json")["guidance_explained"]["mean"] == result.explained.mean
    assert_same_tensors(teacher.denoiser.state_dict(), base)


@given(
    st.sampled_from(["l2", "l1"]),
    st.sampled_from(["uniform", "omega"]),
    st.lists(st.floats(1, 8), min_size=1, max_size=4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(0, 99),
)
def test_distillation_loss_matches_the_formula(loss, weighting, omega, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(len(omega), *shape, generator=generator, dtype=torch.float64) for _ in range(2))
    total = 0.0
    for p, t, scale in zip(prediction, target, omega, strict=True):
        errors = [abs(a - b) ** (2 if loss == "l2" else 1) for a, b in zip(p.flatten(), t.flatten(), strict=True)]
        total += sum(errors) / len(errors) / ((scale - 1) ** 2 + 0.25 if weighting == "omega" else 1)
    found = distillation_loss(prediction, target, torch.tensor(omega), loss, weighting)
    torch.testing.assert_close(found, torch.as_tensor(total / len(omega)).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distillation_loss_is_float32(dtype):
    prediction, target = torch.full((2, 3), 300.0, dtype=dtype), torch.zeros(2, 3, dtype=dtype)
    found = distillation_loss(prediction, target, torch.ones(2), "l2", "uniform")
    assert found.dtype == torch.float32
    assert found == 90000  # infinite in float16


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_batch_rows_visit_every_state_once_an_epoch(states, batch_size, seed):
    steps = -(-3 * states // batch_size)
    visited = torch.cat([batch_rows(step, batch_size, states, seed) for step in range(steps)])
    assert len(visited) == steps * batch_size
    for epoch in visited.split(states)[:3]:
        assert sorted(epoch.tolist()) == list(range(states))
    if states > 10:
        assert not torch.equal(visited[:states], visited[states : 2 * states])


@given(st.integers(0, 200), st.integers(1, 50), st.integers(1, 40))
def test_batch_rows_depend_on_the_position_alone(step, batch_size, states):
    alone = batch_rows(step, batch_size, states, 0)
    batch_rows(step + 100, batch_size, states, 0)
    whole = torch.cat([batch_rows(s, 1, states, 0) for s in range(step * batch_size, (step + 1) * batch_size)])
    assert torch.equal(alone, whole)
    assert len(batch_rows(step, batch_size, states, 1)) == batch_size


def test_student_gives_gradients_to_the_adapter_alone(tmp_path):
    teacher = tiny_teacher()
    distill_tiny(tmp_path, teacher)  # no parameter of the adapter is zero any more
    states = Trajectories(tmp_path / "trajectories")
    batch = states[torch.arange(8)]
    with frozen(teacher.denoiser):
        (prediction,) = Student(teacher)([batch])
        distillation_loss(prediction, batch.target, batch.omega, "l2", "uniform").backward()
    assert [name for name, p in teacher.denoiser.named_parameters() if p.grad is not None] == []
    gradients = {name: p.grad for name, p in attachment_of(teacher).adapter.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.any()] == []
    with agd.guided(teacher, batch.omega), torch.no_grad():
        assert torch.equal(prediction, teacher.predict(batch.sample, batch.timestep, batch.conditions))


def test_distill_changes_nothing_of_the_base(tmp_path):
    teacher = tiny_teacher()
    denoiser = teacher.denoiser.train()
    denoiser.proj_out_1.requires_grad_(False)
    denoiser.transformer_blocks[0].ff.eval()
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    modes = {name: module.training for name, module in denoiser.named_modules()}
    base = {name: value.clone() for name, value in denoiser.state_dict().items()}
    rng = torch.get_rng_state()
    distill_tiny(tmp_path / "a", teacher)
    assert_same_tensors(denoiser.state_dict(), base)
    assert {name: p.requires_grad for name, p in denoiser.named_parameters()} == flags
    assert {name: module.training for name, module in denoiser.named_modules()} == modes
    assert [name for name, p in denoiser.named_parameters() if p.grad is not None] == []
    assert torch.equal(torch.get_rng_state(), rng)
    # DiT drops labels at random in train mode, which neither collecting nor training may see
    distill_tiny(tmp_path / "b")
    assert contents(tmp_path / "a")["adapter.safetensors"] == contents(tmp_path / "b")["adapter.safetensors"]


def test_distill_leaves_no_gradients_in_the_adapter(tmp_path):
    result = distill_tiny(tmp_path)
    assert all(p.grad is None and p.requires_grad for p in result.adapter.parameters())


def test_distill_writes_what_it_returns(tmp_path):
    teacher = tiny_teacher()
    result = distill_tiny(tmp_path, teacher, validation=3)
    names = {
        "adapter.safetensors",
        "samples.png",
        "adapter_config.json",
        "distill.json",
        "log.jsonl",
        "checkpoint.safetensors",
        "trajectories",
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    written = read_json(tmp_path / "distill.json")
    assert written["parameters"] == result.parameters == sum(p.numel() for p in result.adapter.parameters())
    assert written["fraction"] == result.fraction == result.parameters / sum(p.numel() for p in teacher.denoiser.parameters())
    assert written["loss"] == result.loss == logged(tmp_path)[-1]["loss"]
    assert written["guidance_explained"] == result.explained.to_dict()
    assert set(result.seconds) == {"collect", "train", "validate"}
    config = read_json(tmp_path / "adapter_config.json")
    assert config["about"]["train"] == short(learning_rate=2e-2, seed=0).to_dict()
    assert config["adapter"]["guidance_range"] == [1.0, 6.0]
    assert_same_tensors(read_tensors(tmp_path / "adapter.safetensors")[0], result.adapter.state_dict())


@pytest.mark.parametrize("change", [{}, {"loss": "l1"}, {"weighting": "uniform"}, {"loss": "l1", "weighting": "uniform"}])
def test_distill_first_loss_is_that_of_the_base(tmp_path, change):
    config = short(steps=1, **change)
    distill_tiny(tmp_path, train_config=config)
    states, teacher = Trajectories(tmp_path / "trajectories"), tiny_teacher()
    batch = states[batch_rows(0, 8, len(states), 0)]
    with torch.no_grad():
        base = teacher.predict(batch.sample, batch.timestep, batch.conditions)
    expected = distillation_loss(base, batch.target, batch.omega, config.loss, config.weighting)
    assert logged(tmp_path)[0]["loss"] == float(expected)


def test_distill_logs_every_few_steps_and_the_last(tmp_path):
    config = short(steps=10, log_every=3, warmup=0.2, learning_rate=0.5)
    distill_tiny(tmp_path, train_config=config)
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == [3, 6, 9, 10]
    for entry in entries:
        assert set(entry) == {"step", "loss", "grad_norm", "learning_rate", "samples_per_second"}
        share = (entry["step"] - 2) / 8  # of the cosine, after two steps of warm-up
        assert entry["learning_rate"] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * share)))
        assert entry["samples_per_second"] > 0
        assert entry["grad_norm"] > 0


def test_distill_logs_the_mean_since_the_last_entry(tmp_path):
    for log_every in (1, 4):
        distill_tiny(tmp_path / str(log_every), train_config=short(steps=8, log_every=log_every))
    every, fourth = ([entry["loss"] for entry in logged(tmp_path / name)] for name in ("1", "4"))
    assert fourth == pytest.approx([sum(every[:4]) / 4, sum(every[4:]) / 4])


def test_distill_writes_tensorboard_on_request(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill_tiny(tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()
    distill_tiny(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "learning_rate", "samples_per_second"):
        found = [(event.step, event.value) for event in events.Scalars(f"distill/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name])) for entry in logged(tmp_path)]


def test_distill_saves_the_moving_average(tmp_path, monkeypatch):
    import agd_fast.distillation.train as training

    weights, decay = [], 0.6

    def record(path, step, run, modules, optimizer, others):
        weights.append({name: p.detach().clone() for name, p in modules["adapter"].named_parameters()})
        save_checkpoint(path, step, run, modules, optimizer, others)

    teacher = tiny_teacher()
    torch.manual_seed(0)
    average = {name: p.detach().clone() for name, p in agd.attach(teacher, small()).named_parameters()}
    agd.unload(teacher)
    monkeypatch.setattr(training, "save_checkpoint", record)
    result = distill_tiny(tmp_path, teacher, train_config=short(ema=decay, checkpoint_every=1))
    for step, now in enumerate(weights):
        d = min(decay, (1 + step) / (10 + step))
        average = {name: d * average[name] + (1 - d) * now[name] for name in now}
    for name, p in result.adapter.named_parameters():
        torch.testing.assert_close(p.detach(), average[name])
        assert not torch.equal(p, weights[-1][name])


def test_distill_in_bf16_keeps_weights_and_base_in_float32(tmp_path):
    configs = {precision: short(mixed_precision=precision) for precision in ("no", "bf16")}
    results = {name: distill_tiny(tmp_path / name, train_config=config) for name, config in configs.items()}
    assert results["no"].loss != results["bf16"].loss
    assert results["bf16"].loss == pytest.approx(results["no"].loss, rel=12 * torch.finfo(torch.bfloat16).eps)  # 12 steps
    assert {value.dtype for value in results["bf16"].adapter.state_dict().values()} == {torch.float32}


def test_distill_a_base_in_bfloat16(tmp_path):
    teacher = tiny_teacher()
    teacher.denoiser.to(torch.bfloat16)
    result = distill_tiny(tmp_path, teacher)
    assert {value.dtype for value in result.adapter.state_dict().values()} == {torch.float32}
    assert Trajectories(tmp_path / "trajectories").shards[0]["sample"].dtype == torch.bfloat16
    assert logged(tmp_path)[-1]["loss"] < logged(tmp_path)[0]["loss"]


def test_checkpoint_keeps_a_gradient_scaler(tmp_path):
    def parts():
        module = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(module.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        others = {"schedule": torch.optim.lr_scheduler.ConstantLR(optimizer), "scaler": scaler}
        return {"adapter": module}, optimizer, others

    modules, optimizer, others = parts()
    scaler = others["scaler"]
    scaler.scale(modules["adapter"](torch.full((1, 2), torch.inf)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()  # the gradient overflowed: half the scale
    save_checkpoint(tmp_path / "file", 1, {}, modules, optimizer, others)
    fresh = parts()
    assert load_checkpoint(tmp_path / "file", {}, *fresh) == 1
    assert fresh[2]["scaler"].get_scale() == 4.0


@pytest.mark.parametrize("ema", [None, 0.9])
def test_distill_reads_nothing_off_the_device_between_logs(tmp_path, monkeypatch, ema):
    """Every way in which Python reads a tensor, by the file that did it; states and AdamW's step lie on the CPU."""
    reads = Counter()
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__len__"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), name, reads))
    distill_tiny(tmp_path / "warm")
    counts = []
    for steps in (20, 40):
        reads.clear()
        config = short(steps=steps, log_every=steps, checkpoint_every=steps, ema=ema)
        distill_tiny(tmp_path / str(steps), train_config=config)
        counts.append(Counter(reads))
    assert counts[0], "nothing was counted at all"
    allowed = {"trajectories/dataset.py", "optim/adamw.py", "optim/adam.py", "optim/optimizer.py"}
    every_step = {where: count - counts[0][where] for where, count in counts[1].items() if count > counts[0][where]}
    assert {where for where, _ in every_step} <= allowed, every_step


def counting(method, name, reads):
    import sys

    def call(self, *args, **kwargs):
        if not (name == "__len__" and self.device.type == "cpu"):
            file = sys._getframe(1).f_code.co_filename
            reads["/".join(Path(file).parts[-2:]), name] += 1
        return method(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_distill_stops_at_a_loss_that_is_not_finite(tmp_path, value):
    distill_tiny(tmp_path / "first")
    teacher, spoiled = tiny_teacher(), Spoiled(tmp_path / "first" / "trajectories", 8, value)
    base = {name: v.clone() for name, v in teacher.denoiser.state_dict().items()}
    config = short(steps=20, checkpoint_every=5, log_every=20)
    with pytest.raises(FloatingPointError, match=f"at step 8; .*{tmp_path}/run/checkpoint.safetensors"):
        distill_tiny(tmp_path / "run", teacher, trajectories=spoiled, train_config=config)
    tensors, metadata = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert metadata["step"] == "5"
    assert all(torch.isfinite(v).all() for v in tensors.values())
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert attachment_of(teacher) is None
    assert all(p.requires_grad for p in teacher.denoiser.parameters())
    assert_same_tensors(teacher.denoiser.state_dict(), base)
    # with the cause gone, the run goes on from there
    sound = Trajectories(tmp_path / "first" / "trajectories")
    distill_tiny(tmp_path / "run", teacher, trajectories=sound, train_config=config)
    distill_tiny(tmp_path / "whole", trajectories=sound, train_config=config)
    assert contents(tmp_path / "run")["adapter.safetensors"] == contents(tmp_path / "whole")["adapter.safetensors"]


def test_distill_stops_before_the_first_checkpoint(tmp_path):
    distill_tiny(tmp_path / "first")
    spoiled = Spoiled(tmp_path / "first" / "trajectories", 1, math.nan)
    with pytest.raises(FloatingPointError, match="at step 1; .*none was written yet"):
        distill_tiny(tmp_path / "run", trajectories=spoiled)


def one_of_two(rank, directory, port, settings):
    """What a launcher of two processes on the CPU sets up."""
    import os

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"})
    teacher, batches = tiny_teacher(), []
    teacher.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: batches.extend([len(kwargs["timestep"])] * torch.is_grad_enabled()), with_kwargs=True
    )
    try:
        result = distill_tiny(directory, teacher, train_config=short(**settings))
    except (ValueError, FloatingPointError) as error:
        return error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return result.loss, {name: value.numpy() for name, value in result.adapter.state_dict().items()}, set(batches)


def in_two(directory, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return in_children(one_of_two, 2, directory, port, settings)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_distill_in_two_processes_is_as_in_one(tmp_path, ema):
    one = distill_tiny(tmp_path / "one", train_config=short(ema=ema))
    first, second = in_two(tmp_path / "two", ema=ema)
    assert first[0] == second[0] == pytest.approx(one.loss)
    assert first[2] == second[2] == {4}  # half of each batch
    for name, value in one.adapter.state_dict().items():
        assert (first[1][name] == second[1][name]).all()
        torch.testing.assert_close(torch.from_numpy(first[1][name]), value)
    saved, _ = read_tensors(tmp_path / "two" / "adapter.safetensors")
    assert_same_tensors(saved, {name: torch.from_numpy(value) for name, value in first[1].items()})
    losses = [[entry["loss"] for entry in logged(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ValueError, match="processes: expected 1, found 2"):
        distill_tiny(tmp_path / "two", train_config=short(ema=ema))


def test_distill_in_two_processes_refuses_a_batch_they_cannot_share(tmp_path):
    for error in in_two(tmp_path, batch_size=7):
        assert "batch_size must be a multiple of the 2 processes, found 7" in str(error)


@pytest.mark.parametrize("kind", ["modulation", "offset", "cross_attention"])
def test_distill_a_custom_denoiser(tmp_path, kind):
    teacher = custom_teacher()
    config = TrainConfig(steps=60, batch_size=16, learning_rate=1e-2)
    result = distill_tiny(
        tmp_path, teacher, adapter=small(kind=kind), train_config=config, trajectories=30, shard_size=30, validation=12
    )
    assert result.explained.mean > 0
    images = agd.sample(teacher, [0, 1], guidance_scale=3.0, steps=3, seed=0)
    agd.load(fresh := custom_teacher(), tmp_path)
    assert torch.equal(agd.sample(fresh, [0, 1], guidance_scale=3.0, steps=3, seed=0), images)


@pytest.mark.parametrize("kind", ["modulation", "cross_attention"])
def test_distill_a_unet_with_prompts(tmp_path, kind):
    torch.manual_seed(0)
    denoiser = unet()
    prompts, empty = torch.randn(5, 3, 8), torch.zeros(1, 3, 8)
    settings = {
        "scheduler": ddim(),
        "class_labels": None,
        "conditions": {"encoder_hidden_states": prompts},
        "adapter": small(kind=kind),
        "train_config": TrainConfig(steps=100, batch_size=16, learning_rate=1e-2),
        "trajectories": 100,
        "shard_size": 10,
        "validation": 5,
    }
    with pytest.raises(ValueError, match="the null value of 'encoder_hidden_states' is unknown"):
        distill_tiny(tmp_path, denoiser, **settings)
    assert attachment_of(denoiser) is None
    result = distill_tiny(tmp_path, denoiser, null_condition={"encoder_hidden_states": empty}, **settings)
    assert result.explained.mean > 0.15  # measured: .30 to .45 over seeds and kinds
    rows = Trajectories(tmp_path / "trajectories")[torch.arange(20)]
    assert torch.equal(rows.conditions["encoder_hidden_states"], prompts[torch.arange(20) % 5])


def test_distill_a_pipeline(tmp_path):
    pipe = DiTPipeline(dit(channels=4), AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4), ddim())
    result = distill_tiny(tmp_path, pipe)
    assert attachment_of(pipe).adapter is result.adapter
    assert attachment_of(pipe.transformer).adapter is result.adapter
    assert agd.sample(pipe, [0, 1], steps=2, seed=0).shape == (2, 4, 4, 4)
    assert read_json(tmp_path / "adapter_config.json")["about"]["base_model"] == "DiTPipeline"
    agd.unload(pipe)
    assert attachment_of(agd.load(pipe, tmp_path)) is not None


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler(), HeunDiscreteScheduler()])
def test_distill_with_another_scheduler(tmp_path, scheduler):
    result = distill_tiny(tmp_path, dit(), scheduler=scheduler, validation=3)
    assert math.isfinite(result.explained.mean)
    scheduler.set_timesteps(3)
    assert set(result.explained.by_time) == {float(t) for t in scheduler.timesteps}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 7], r"class_labels must lie in 0\.\.\d; found 0\.\.7"),
        ([-1], r"class_labels must lie in 0\.\.\d; found -1"),
        ([], "expected conditions of one positive length"),
    ],
)
def test_distill_refuses_labels_that_do_not_fit(tmp_path, labels, message):
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", teacher, class_labels=labels)
    assert attachment_of(teacher) is None
    assert not (tmp_path / "run").exists()


def test_distill_without_labels_takes_all_but_the_null_label(tmp_path):
    distill_tiny(tmp_path, class_labels=None, trajectories=6, shard_size=6)
    labels = Trajectories(tmp_path / "trajectories").shards[0]["condition/class_labels"]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_distill_without_conditions_names_what_a_text_model_needs(tmp_path):
    teacher = agd.Teacher(unet(), ddim(), null_condition={"encoder_hidden_states": torch.zeros(1, 2, 8)})
    with pytest.raises(ValueError, match=r"expected the conditions .*missing \['encoder_hidden_states'\]"):
        distill_tiny(tmp_path / "run", teacher, class_labels=None)


def test_distill_refuses_an_unknown_condition(tmp_path):
    with pytest.raises(ValueError, match=r"unknown \['prompt'\]"):
        distill_tiny(tmp_path, conditions={"prompt": torch.zeros(3)})


def test_distill_refuses_a_model_with_an_adapter_and_keeps_it(tmp_path):
    teacher = tiny_teacher()
    adapter = agd.attach(teacher, small())
    with pytest.raises(ValueError, match="already has an adapter"):
        distill_tiny(tmp_path, teacher)
    assert attachment_of(teacher).adapter is adapter


def test_distill_on_trajectories_collected_before(tmp_path):
    distill_tiny(tmp_path / "a")
    states = Trajectories(tmp_path / "a" / "trajectories")
    distill_tiny(tmp_path / "b", trajectories=states)
    assert contents(tmp_path / "a")["adapter.safetensors"] == contents(tmp_path / "b")["adapter.safetensors"]
    assert not (tmp_path / "b" / "trajectories").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": tiny_teacher(channels=2)}, r"sample_shape: expected \[2, 4, 4\], found \[1, 4, 4\]"),
        ({"teacher": custom_teacher()}, "model.class: expected 'Net', found 'DiTTransformer2DModel'"),
        ({"guidance_range": (1, 12)}, r"guidance_range: expected \[1.0, 12.0\], found \[1.0, 6.0\]"),
        ({"scheduler": EulerDiscreteScheduler()}, "prediction_type: expected 'epsilon', found 'v_prediction'"),
    ],
)
def test_distill_refuses_trajectories_that_do_not_fit(tmp_path, change, message):
    distill_tiny(tmp_path / "a")
    states = Trajectories(tmp_path / "a" / "trajectories")
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "b", trajectories=states, **change)
    assert not (tmp_path / "b").exists()


def test_distill_warns_of_trajectories_of_other_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill_tiny(tmp_path / "a")
    states = Trajectories(tmp_path / "a" / "trajectories")
    with pytest.warns(UserWarning, match="collected from other weights than this DiTTransformer2DModel"):
        distill_tiny(tmp_path / "b", tiny_teacher(seed=1), trajectories=states)


def first_loss(directory, teacher, config, **settings):
    """The logged loss of a first training step, and that of the teacher's adapter as it is, on the same states."""
    distill_tiny(directory, tiny_teacher(), train_config=config, **settings)
    states = Trajectories(directory / "trajectories")
    batch = states[batch_rows(0, config.batch_size, len(states), 0)]
    with torch.no_grad():
        prediction = teacher.predict_agd(batch.sample, batch.timestep, batch.conditions, batch.omega)
    expected = distillation_loss(prediction, batch.target, batch.omega, config.loss, config.weighting)
    return logged(directory)[0]["loss"], float(expected)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A trained adapter to go on from, of a range and a width that are not the defaults."""
    directory = tmp_path_factory.mktemp("before") / "adapter"
    distill_tiny(directory, adapter=small(hidden=5), guidance_range=(1.0, 4.0))
    return directory


@pytest.mark.parametrize("source", ["trajectories", "student"])
def test_distill_goes_on_from_another_adapter(tmp_path, before, source):
    teacher = agd.load(tiny_teacher(), before)
    found, expected = first_loss(tmp_path, teacher, short(log_every=1), adapter=None, init=before, source=source)
    assert found == expected
    config, trained_before = (read_json(folder / "adapter_config.json") for folder in (tmp_path, before))
    assert config["adapter"] == trained_before["adapter"]
    weights = fingerprint(read_tensors(before / "adapter.safetensors")[0])
    assert (config["about"]["source"], config["about"]["init"]) == (source, weights)
    assert (trained_before["about"]["source"], trained_before["about"]["init"]) == ("trajectories", None)
    assert config["about"]["teacher"] == "agd_fast.ops.guidance_combine"
    collected_with = read_json(tmp_path / "trajectories" / "manifest.json")["plan"]["adapter"]
    assert (collected_with and collected_with["hash"]) == (weights if source == "student" else None)


def test_distill_on_its_own_states_lowers_the_error_there(tmp_path):
    settings = {"train_config": TrainConfig(steps=60, batch_size=16), "trajectories": 30, "shard_size": 30}
    distill_tiny(tmp_path / "a", **settings)
    distill_tiny(tmp_path / "b", teacher := tiny_teacher(), source="student", init=tmp_path / "a", **settings)
    table, options = teacher.conditions(list(range(3)) * 4), {"states": "student", "steps": 4}
    after = guidance_explained(teacher, table, **options).mean
    earlier = guidance_explained(agd.load(tiny_teacher(), tmp_path / "a"), table, **options).mean
    assert after > earlier > 0


def test_distill_goes_on_at_another_checkpoint_of_the_base(tmp_path, before):
    result = distill_tiny(tmp_path, tiny_teacher(seed=1), adapter=None, init=before)
    assert result.adapter.config.guidance_range == (1.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": small(hidden=4, guidance_range=(1.0, 4.0))}, "adapter.* asked for .hidden: expected 4, found 5"),
        ({"adapter": agd.AdapterConfig(kind="offset", guidance_range=(1.0, 4.0))}, "kind: expected 'offset', found 'modulation'"),
        ({"guidance_range": (1, 6)}, r"guidance_range: expected \[1.0, 6.0\], found \[1.0, 4.0\]"),
        ({"teacher": dit(width=32)}, r"width mismatch at .* 16 → 96 channels, this base 32 → 192"),
        ({"teacher": custom_teacher()}, "adapter for a DiTTransformer2DModel, expected one for this Net"),
        ({"scheduler": EulerDiscreteScheduler()}, "prediction_type='v_prediction', expected 'epsilon'"),
    ],
)
def test_distill_refuses_an_adapter_that_does_not_fit(tmp_path, before, settings, message):
    settings = {"teacher": tiny_teacher(), "adapter": None, **settings}
    if isinstance(settings["teacher"], torch.nn.Module):
        settings["scheduler"] = ddim()
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", init=before, **settings)
    assert attachment_of(settings["teacher"]) is None
    assert not (tmp_path / "run").exists()


def test_distill_leaves_open_what_a_config_does_not_decide(tmp_path, before):
    config = agd.AdapterConfig(guidance_range=(1.0, 4.0))
    assert config.hidden is None
    assert distill_tiny(tmp_path, adapter=config, init=before).adapter.config.hidden == 5


def test_distill_needs_a_trained_adapter_for_its_own_states(tmp_path, before):
    with pytest.raises(ValueError, match=r"source='student' expects init=.*found None"):
        distill_tiny(tmp_path, source="student")
    with pytest.raises(FileNotFoundError, match="expected adapter_config.json"):
        distill_tiny(tmp_path, source="student", init=tmp_path / "nothing")
    saved = contents(before)
    with pytest.raises(ValueError, match="expected an output_dir other than init"):
        distill_tiny(before, init=before.parent / "." / before.name, adapter=None)
    assert contents(before) == saved
    assert contents(tmp_path) == {}


def test_distill_takes_the_range_of_the_config_or_its_own(tmp_path):
    ranges = {"config": ({}, (1.0, 3.0)), "own": ({"guidance_range": (2, 5)}, (2.0, 5.0))}
    for name, (settings, expected) in ranges.items():
        result = distill_tiny(tmp_path / name, adapter=small(guidance_range=(1.0, 3.0)), **settings)
        assert result.adapter.config.guidance_range == expected
        omega = Trajectories(tmp_path / name / "trajectories")[torch.arange(18)].omega
        assert expected[0] <= omega.min() < omega.max() <= expected[1]


def conditional(uncond, cond, omega):
    """A rule that does not guide: what a fresh adapter predicts already."""
    return cond


def test_distill_follows_the_teachers_rule_of_guidance(tmp_path):
    base = tiny_teacher()
    teacher = agd.Teacher(base.denoiser, base.scheduler, guidance=conditional)
    distill_tiny(tmp_path / "a", teacher)
    assert logged(tmp_path / "a")[0]["loss"] == pytest.approx(0, abs=torch.finfo(torch.float32).eps)
    assert read_json(tmp_path / "a" / "adapter_config.json")["about"]["teacher"] == "test_distillation.conditional"
    states = Trajectories(tmp_path / "a" / "trajectories")
    expected = "guidance: expected 'agd_fast.ops.guidance_combine', found 'test_distillation.conditional'"
    with pytest.raises(ValueError, match=expected):
        distill_tiny(tmp_path / "b", trajectories=states)


@pytest.mark.parametrize(
    "change",
    [{"steps": 0}, {"loss": "l3"}, {"weighting": "time"}, {"mixed_precision": "fp8"}, {"warmup": 2.0}, {"ema": 1.0}],
)
def test_train_config_refuses(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*found"):
        TrainConfig(**change)


@pytest.mark.parametrize("scheduler", [ddim(), HeunDiscreteScheduler()])  # Heun's method visits a t twice
def test_guidance_explained_matches_the_formula(tmp_path, scheduler):
    teacher = tiny_teacher()
    teacher.scheduler = scheduler
    distill_tiny(tmp_path, teacher, train_config=short(steps=40))
    table = teacher.conditions([0, 1, 2])
    found = guidance_explained(teacher, table, scales=(2.0, 5.0), steps=3, seed=9, batch_size=2)
    errors = []
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    for omega, rows in itertools.product((2.0, 5.0), (slice(0, 2), slice(2, 3))):
        scheduler.set_timesteps(3)
        x, part = noise[rows] * scheduler.init_noise_sigma, {"class_labels": table["class_labels"][rows]}
        for t in scheduler.timesteps:
            state = scheduler.scale_model_input(x, t), t.expand(len(x)), part
            with torch.no_grad():
                cfg, cond = teacher.predict_cfg(*state, torch.full((len(x),), omega))
                with agd.guided(teacher, omega):
                    student = teacher.predict(*state)
            errors.append((omega, float(t), float((student - cfg).square().sum()), float((cond - cfg).square().sum())))
            x = scheduler.step(cfg, t, x).prev_sample

    def explained(column, value):
        selected = [row for row in errors if row[column] == value]
        return 1 - sum(row[2] for row in selected) / sum(row[3] for row in selected)

    by_scale = {omega: explained(0, omega) for omega in (2.0, 5.0)}
    by_time = {t: explained(1, t) for t in scheduler.timesteps.tolist()}
    assert found.by_scale == pytest.approx(by_scale)
    assert found.by_time == pytest.approx(by_time)
    assert found.mean == pytest.approx(sum(by_scale.values()) / 2)
    assert json.loads(json.dumps(found.to_dict()))["by_scale"] == {"2": found.by_scale[2.0], "5": found.by_scale[5.0]}


def test_guidance_explained_without_adapter():
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="no adapter is attached"):
        guidance_explained(teacher, teacher.conditions(range(3)))


def test_distill_of_a_float16_base_asks_for_a_scaler(tmp_path):
    teacher = tiny_teacher()
    teacher.denoiser.half()
    with pytest.raises(ValueError, match="float16 base.*expected mixed_precision='fp16'.*found mixed_precision='no'"):
        distill_tiny(tmp_path, teacher)
    assert attachment_of(teacher) is None


def test_distill_trains_with_its_own_seed(tmp_path):
    """Unless the training names another."""
    orders = {}
    for name, seed in (("followed", None), ("named", 3)):
        config = TrainConfig(steps=2, batch_size=4, learning_rate=1e-2, seed=seed)
        distill_tiny(tmp_path / name, tiny_teacher(), seed=5, train_config=config, validation=0)
        orders[name] = read_json(tmp_path / name / "adapter_config.json")["about"]["train"]["seed"]
    assert orders == {"followed": 5, "named": 3}


def test_distill_of_the_null_label_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="class_labels holds the null label"):
        distill_tiny(tmp_path, agd.datasets.digits_teacher(), class_labels=[3, 10])
