"""agd_fast.distill: what is trained, on what, and what comes out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.checkpoint import load_checkpoint, save_checkpoint
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import batch_rows
from agd_fast.files import read_json, read_tensors
from agd_fast.freezing import frozen
from agd_fast.trajectories import Trajectories, collect
from helpers_distillation import (
    assert_same_tensors,
    contents,
    distill_tiny,
    logged,
    short,
    small,
    tiny_teacher,
)


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
        prediction = Student(teacher)(batch)
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


def test_validation_is_of_the_moving_average_which_is_saved(tmp_path):
    one_scale = {"guidance_range": (2.5, 3.5)}
    distill_tiny(tmp_path, train_config=short(ema=0.6), validation=1, validate_every=12, **one_scale)
    last, saved = (read_json(tmp_path / name) for name in ("validation/step-000012.json", "distill.json"))
    assert last.pop("step") == 12
    assert last == saved["guidance_explained"]


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_distill_whose_pictures_cannot_be_drawn_says_so_and_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr("agd_fast.distillation.job.preview", failing(torch.OutOfMemoryError("the VAE")))
    (tmp_path / "samples.png").write_text("of an earlier run")
    teacher, settings = tiny_teacher(), {"guidance_range": (2.5, 3.5), "validation": 1, "validate_every": 12}
    with pytest.warns(UserWarning, match="was not drawn") as warned:
        result = distill_tiny(tmp_path, teacher, **settings)
    files = (tmp_path / "validation" / "step-000012.png", tmp_path / "samples.png")
    found = [str(one.message) for one in warned if "was not drawn" in str(one.message)]
    assert not any(file.exists() for file in files)
    assert found == [f"{file} was not drawn: OutOfMemoryError: {found[0].rpartition('Error: ')[2]}" for file in files]
    assert result.explained is not None and {"adapter.safetensors", "distill.json"} <= contents(tmp_path).keys()
    assert attachment_of(teacher).adapter is result.adapter


def test_distill_stopped_while_drawing_leaves_no_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr("agd_fast.distillation.job.preview", failing(KeyboardInterrupt))
    teacher = tiny_teacher()
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(tmp_path, teacher, guidance_range=(2.5, 3.5), validation=1)
    assert attachment_of(teacher) is None


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


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"batch_size": 2.5},
        {"loss": "l3"},
        {"weighting": "time"},
        {"mixed_precision": "fp8"},
        {"warmup": 2.0},
        {"ema": 1.0},
        {"seed": 1.5},
        {"seed": 2**63 - 1},
    ],
)
def test_train_config_refuses(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} .*found"):
        TrainConfig(**change)


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
