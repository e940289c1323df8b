"""Collecting states of the teacher, and reading them back."""

import logging
import shutil
from functools import partial

import pytest
import torch
from diffusers import HeunDiscreteScheduler, PNDMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.trajectories import collect
from agd_fast.trajectories.manifest import Plan
from agd_fast.trajectories.reservoir import Reservoir
from helpers_distillation import NAMES, after_calls, collect_tiny, contents, rows_of, tiny_teacher


def guided_by_hand(teacher, x, label, omega, steps):
    """The plain reading of the method for one trajectory: x, t and ε_cfg at each step."""
    dtype, denoiser, scheduler = x.dtype, teacher.denoiser, teacher.scheduler
    scheduler.set_timesteps(steps)
    visited = []
    for t in scheduler.timesteps:
        with torch.no_grad():
            uncond = denoiser(x, timestep=t[None], class_labels=torch.tensor([3])).sample
            cond = denoiser(x, timestep=t[None], class_labels=torch.tensor([label])).sample
        target = uncond + omega.to(dtype) * (cond - uncond)
        visited.append((x, t, target))
        x = scheduler.step(target, t, x).prev_sample
    return visited


def test_collect_matches_guidance_by_hand(trajectories):
    teacher, exact = tiny_teacher(), tiny_teacher()
    exact.denoiser.double()
    for index, shard in enumerate(trajectories.shards):
        count = len(shard["omega"]) // 4
        for i in range(count):
            mine = {name: shard[name][i::count] for name in (*NAMES, "step")}
            omega, label = mine["omega"][0], (2 * index + i) % 3
            start = mine["sample"][:1]
            plain = guided_by_hand(teacher, start, label, omega, 4)
            reference = guided_by_hand(exact, start.double(), label, omega, 4)
            assert shard["condition/class_labels"][mine["condition"]].tolist() == [label] * 4
            assert mine["omega"].tolist() == [float(omega)] * 4
            assert mine["timestep"].tolist() == [int(t) for _, t, _ in plain]
            assert mine["step"].tolist() == [0, 1, 2, 3]
            for name, column in (("sample", 0), ("target", 2)):
                low, high = (torch.cat([state[column] for state in states]) for states in (plain, reference))
                error = (mine[name] - high).abs().max()
                assert error < 2 * (low - high).abs().max() + 1e-6, name


def test_collect_draws_omega_over_the_whole_range(tmp_path):
    rows = rows_of(collect_tiny(tmp_path, trajectories=400, steps=1, shard_size=200, guidance_range=(2.0, 5.0)))
    omega = rows["omega"]
    assert 2.0 <= omega.min() < 2.05 < 4.95 < omega.max() <= 5.0
    assert len(omega.unique()) > 390


def test_collect_cycles_through_the_conditions(tmp_path):
    found = collect_tiny(tmp_path, labels=[2, 0, 1, 1], trajectories=10, steps=1, shard_size=3)
    assert found[torch.arange(10)].conditions["class_labels"].tolist() == [2, 0, 1, 1, 2, 0, 1, 1, 2, 0]


@pytest.mark.parametrize("keep", [1, 3])
def test_collect_keeps_states_of_the_same_trajectories(tmp_path, trajectories, keep):
    whole, kept = rows_of(trajectories), rows_of(collect_tiny(tmp_path, keep=keep))
    position = {(float(o), int(s)): row for row, (o, s) in enumerate(zip(whole["omega"], whole["step"], strict=True))}
    rows = torch.tensor([position[float(o), int(s)] for o, s in zip(kept["omega"], kept["step"], strict=True)])
    assert len(rows.unique()) == len(rows) == 5 * keep
    assert {int((kept["omega"] == omega).sum()) for omega in kept["omega"].unique()} == {keep}
    assert all(torch.equal(whole[name][rows], kept[name]) for name in NAMES)


def test_no_more_states_are_held_than_are_kept():
    keys = torch.rand(5, 8, generator=torch.Generator().manual_seed(0))
    states = Reservoir(keys, 3)
    for step in range(6):  # of 8
        states.add({"step": torch.full((5,), step), "row": torch.arange(5)}, {})
        assert len(states.tensors()["row"]) == 5 * min(step + 1, 3)
    found = states.tensors()
    for row in range(5):
        assert found["step"][found["row"] == row].tolist() == keys[row, :6].topk(3, largest=False).indices.sort().values.tolist()


def test_collect_keeps_no_more_than_there_are(tmp_path, trajectories):
    kept = collect_tiny(tmp_path, keep=100)
    assert all(torch.equal(rows_of(kept)[name], rows_of(trajectories)[name]) for name in NAMES)


def test_collect_draws_the_steps_of_each_shard(tmp_path):
    found = collect_tiny(tmp_path, trajectories=24, steps=(2, 5))
    lengths = [int(shard["step"].max()) + 1 for shard in found.shards]
    assert set(lengths) == {2, 3, 4, 5}
    assert len(found) == sum(2 * length for length in lengths)


@pytest.mark.parametrize("scheduler", [PNDMScheduler(skip_prk_steps=True), HeunDiscreteScheduler()])
def test_collect_counts_calls_of_schedulers_that_make_more_than_one_a_step(tmp_path, scheduler):
    teacher = tiny_teacher()
    teacher.scheduler = scheduler
    scheduler.set_timesteps(4)
    calls = len(scheduler.timesteps)
    assert calls > 4
    found = collect_tiny(tmp_path, teacher)
    assert len(found) == 5 * calls
    assert found.shards[0]["timestep"][::2].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_collect_stores_states_in_the_dtype_asked_for(tmp_path, trajectories, dtype):
    stored, whole = rows_of(collect_tiny(tmp_path, dtype=dtype)), rows_of(trajectories)
    for name in ("sample", "target"):
        assert torch.equal(stored[name], whole[name].to(dtype))
    assert torch.equal(stored["omega"], whole["omega"])


def half_guidance(uncond, cond, omega, share=0.5):
    return torch.lerp(cond, agd.ops.guidance_combine(uncond, cond, omega), share)


def test_collect_names_another_rule_of_guidance_than_the_folders(tmp_path, trajectories):
    def teacher(**settings):
        found = tiny_teacher()
        return agd.Teacher(found.denoiser, found.scheduler, name="tiny", guidance=partial(half_guidance, **settings))

    half = rows_of(collect_tiny(tmp_path, teacher()))
    whole = rows_of(trajectories)
    assert torch.equal(half["sample"][:2], whole["sample"][:2])
    assert not torch.equal(half["target"][:2], whole["target"][:2])
    with pytest.raises(ValueError, match=r"guidance: expected 'agd_fast.ops.guidance_combine', found 'test_trajectories.half_"):
        collect_tiny(tmp_path)
    with pytest.raises(ValueError, match=r"guidance: expected 'test_trajectories.half_guidance\(share=0.75\)', found"):
        collect_tiny(tmp_path, teacher(share=0.75))


def test_collect_refuses_a_rule_of_guidance_without_a_name(tmp_path):
    base = tiny_teacher()
    teacher = agd.Teacher(base.denoiser, base.scheduler, guidance=lambda uncond, cond, omega: cond)
    with pytest.raises(ValueError, match="a name tells from others: .* found test_trajectories.*<lambda>"):
        collect_tiny(tmp_path, teacher)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "change",
    [
        {"trajectories": 0},
        {"trajectories": 1.5},
        {"steps": 0},
        {"steps": 2.5},
        {"steps": (5, 4)},
        {"steps": (3, 4, 5)},
        {"keep": 0},
        {"shard_size": 0},
        {"source": "images"},
        {"seed": 1.5},
        {"guidance_range": 5},
        {"dtype": torch.int8},
    ],
)
def test_collect_refuses_numbers_out_of_range(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        collect_tiny(tmp_path, **change)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("scale", "dtype", "base", "message"),
    [
        (1e6, torch.float16, torch.float32, "float16; torch.float16 ends at 65504: expected a base .* of torch.bfloat16 or"),
        (6e4, None, torch.float16, "float16; torch.float16 ends at 65504: expected a base"),
        (1e6, torch.float8_e5m2, torch.float32, "float8_e5m2; torch.float8_e5m2 ends at 57344"),
        (float("nan"), None, torch.float32, "float32; expected finite numbers of the base"),
    ],
)
def test_collect_refuses_states_that_are_not_finite_as_they_are_stored(tmp_path, scale, dtype, base, message):
    teacher = tiny_teacher()
    teacher.denoiser.proj_out_2.weight.data.mul_(scale)
    teacher.denoiser.to(base)
    where = r"the target of a state of shard-00000.safetensors, at step 0 with ω = \d.*, is NaN or infinite in torch"
    with pytest.raises(FloatingPointError, match=rf"{where}\.{message}"):
        collect_tiny(tmp_path, teacher, dtype=dtype)
    assert not list(tmp_path.glob("shard-*"))
    assert len(collect_tiny(tmp_path)) == 20  # with the cause gone, into the same folder


def test_collect_refuses_samples_that_are_not_finite(tmp_path, monkeypatch):
    """Of which targets are zeros."""
    monkeypatch.setattr(agd.Teacher, "start", lambda self, count, generator: torch.full((count, 1, 4, 4), float("inf")))
    monkeypatch.setattr(agd.Teacher, "predict", lambda self, x, timestep, conditions: torch.zeros_like(x))
    with pytest.raises(FloatingPointError, match="the sample of a state of shard-00000.safetensors, at step 0"):
        collect_tiny(tmp_path)


def test_collect_names_a_missing_null_condition(tmp_path):
    teacher = tiny_teacher()
    teacher.denoiser.register_to_config(num_embeds_ada_norm=None)
    with pytest.raises(ValueError, match="num_embeds_ada_norm"):
        collect(teacher, {"class_labels": torch.zeros(1, dtype=torch.long)}, tmp_path, progress=False)
    assert contents(tmp_path) == {}


def test_collect_announces_the_size_before_it_starts(tmp_path, caplog):
    teacher = tiny_teacher()
    said = []
    hook = after_calls(teacher.denoiser, 1, lambda: said.extend(caplog.messages))
    with caplog.at_level(logging.INFO, "agd_fast"):
        found = collect_tiny(tmp_path, teacher)
    hook.remove()
    assert said == [f"collecting 5 trajectories, 20 states, 0.0 MiB in 3 shards (3 to do) into {tmp_path}"]
    stored = sum(shard[name].numel() * shard[name].itemsize for shard in found.shards for name in (*NAMES, "step"))
    assert Plan(**found.manifest.plan).bytes == stored


def test_collect_refuses_a_disk_without_room_before_it_starts(tmp_path, monkeypatch):
    teacher = tiny_teacher()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 100))
    after_calls(teacher.denoiser, 1, partial(pytest.fail, "the denoiser ran"))
    with pytest.raises(OSError, match=f"{tmp_path} needs .* MiB"):
        collect_tiny(tmp_path, teacher)


def test_collect_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    teacher = tiny_teacher()
    before = torch.get_rng_state()
    collect_tiny(tmp_path, teacher)
    assert torch.equal(torch.get_rng_state(), before)


def test_collect_in_train_mode_is_the_same_and_restores_it(tmp_path, folder, trajectories):
    teacher = tiny_teacher()
    teacher.denoiser.train()
    collect_tiny(tmp_path, teacher)
    assert teacher.denoiser.training
    assert contents(tmp_path) == contents(folder)


@settings(max_examples=50)
@given(rows=st.lists(st.integers(0, 19), max_size=30))
def test_trajectories_batch_equals_direct_indexing(trajectories, rows):
    rows = torch.tensor(rows, dtype=torch.long)
    batch, whole = trajectories[rows], rows_of(trajectories)
    for name in ("sample", "timestep", "omega", "target"):
        assert torch.equal(getattr(batch, name), whole[name][rows])
    assert torch.equal(batch.conditions["class_labels"], whole["condition"][rows])


@pytest.mark.parametrize("row", [20, 1000])
def test_trajectories_refuse_rows_past_the_end(trajectories, row):
    with pytest.raises(IndexError):
        trajectories[torch.tensor([0, row])]
