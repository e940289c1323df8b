"""Collecting states of the teacher and reading them back."""

import json
import logging
import shutil
from functools import partial

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.files import read_json, write_json
from agd_fast.trajectories import Trajectories, collect
from agd_fast.trajectories.manifest import Plan
from conftest import assert_as_exact, double, trained
from helpers_distillation import after_calls, collect_tiny, contents, kill_in_child, kill_self, small, tiny_teacher

NAMES = ("sample", "timestep", "omega", "condition", "target")


def rows_of(trajectories):
    """All rows in order, as the shards hold them, with their labels as the condition."""
    rows = {name: torch.cat([shard[name] for shard in trajectories.shards]) for name in (*NAMES, "step")}
    labels = torch.cat([shard["condition/class_labels"][shard["condition"]] for shard in trajectories.shards])
    return {**rows, "condition": labels}


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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def trajectories(folder):
    return collect_tiny(folder)


@pytest.fixture
def copied(trajectories, folder, tmp_path):
    """A folder of finished trajectories to damage."""
    return shutil.copytree(folder, tmp_path / "copied")


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


def ddim_parts(scheduler, t):
    alpha = scheduler.alphas_cumprod[t.long()]
    return alpha.sqrt(), (1 - alpha).sqrt()


def euler_parts(scheduler, t):
    sigma = scheduler.sigmas[[scheduler.timesteps.tolist().index(value) for value in t.tolist()]]
    return 1 / (sigma**2 + 1).sqrt(), sigma / (sigma**2 + 1).sqrt()


def flow_parts(scheduler, t):
    return 1 - t / 1000, t / 1000


@pytest.mark.parametrize(
    ("scheduler", "parts"),
    [
        (DDIMScheduler(timestep_spacing="trailing"), ddim_parts),
        (EulerDiscreteScheduler(), euler_parts),
        (FlowMatchEulerDiscreteScheduler(), flow_parts),
    ],
)
def test_collect_from_data_noises_it_at_the_timesteps_of_the_schedule(tmp_path, scheduler, parts):
    teacher = tiny_teacher()
    teacher.scheduler = scheduler
    scheduler.set_timesteps(4)
    zeros, ones, rows = torch.zeros(3, 1, 4, 4), torch.ones(3, 1, 4, 4), torch.tensor([2, 0, 2])
    noise, signal = (
        rows_of(collect_tiny(tmp_path / name, teacher, source="data", data=(x, rows), trajectories=40, shard_size=20))
        for name, x in (("zeros", zeros), ("ones", ones))
    )
    assert noise["timestep"][::20].tolist()[:4] == scheduler.timesteps.tolist()
    data_scale, noise_scale = parts(scheduler, noise["timestep"])
    differing = (signal["sample"] - noise["sample"]).flatten(1)
    torch.testing.assert_close(differing, data_scale.float()[:, None].expand(-1, 16))
    standard = noise["sample"].flatten(1) / noise_scale.float()[:, None]
    assert standard.mean().abs() < 5 / standard.numel() ** 0.5  # five standard errors
    assert (standard.var() - 1).abs() < 5 * (2 / standard.numel()) ** 0.5
    assert set(noise["condition"].tolist()) == {0, 2}
    state = {name: value[:20] for name, value in noise.items()}
    with teacher.base():
        target, _ = teacher.predict_cfg(state["sample"], state["timestep"], {"class_labels": state["condition"]}, state["omega"])
    assert torch.equal(target, state["target"])


def with_adapter(seed=0, **config):
    """A tiny teacher with an adapter of random weights."""
    teacher = tiny_teacher()
    torch.manual_seed(seed)
    trained(agd.attach(teacher, small(**config)))
    return teacher


@torch.no_grad()
def driven_by_hand(denoiser, scheduler, x, label, omega, steps):
    """One trajectory that the adapter drives: x and the teacher's ε_cfg at each step."""
    scheduler.set_timesteps(steps)
    visited = []
    for t in scheduler.timesteps:
        with agd.disabled(denoiser):
            uncond, cond = (denoiser(x, timestep=t[None], class_labels=torch.tensor([c])).sample for c in (3, label))
        visited.append((x, uncond + omega.to(x) * (cond - uncond)))
        with agd.guided(denoiser, omega):
            student = denoiser(x, timestep=t[None], class_labels=torch.tensor([label])).sample
        x = scheduler.step(student, t, x).prev_sample
    return [torch.cat(column) for column in zip(*visited, strict=True)]


def test_collect_from_the_student_follows_its_adapter_and_asks_the_teacher(tmp_path):
    teacher = with_adapter()
    shard = collect_tiny(tmp_path, teacher, source="student", trajectories=3, shard_size=3).shards[0]
    exact = double(teacher.denoiser)
    for label in range(3):
        mine = {name: value[label::3] for name, value in shard.items()}
        start, omega = mine["sample"][:1], mine["omega"][0]
        plain = driven_by_hand(teacher.denoiser, teacher.scheduler, start, label, omega, 4)
        reference = driven_by_hand(exact, teacher.scheduler, start.double(), label, omega, 4)
        assert_as_exact(mine["sample"], plain[0], reference[0])
        assert_as_exact(mine["target"], plain[1], reference[1])


def test_collect_starts_every_source_from_the_same_noise(tmp_path, trajectories):
    first = collect_tiny(tmp_path, with_adapter(), source="student").shards[0]
    same = {name: torch.equal(first[name], trajectories.shards[0][name]) for name in ("omega", "condition", "timestep")}
    assert all(same.values()), same
    assert torch.equal(first["sample"][:2], trajectories.shards[0]["sample"][:2])
    assert not torch.equal(first["sample"][2:], trajectories.shards[0]["sample"][2:])


def test_collect_from_the_student_of_a_zero_adapter_is_unguided(tmp_path):
    teacher = tiny_teacher()
    agd.attach(teacher, small())
    shard = collect_tiny(tmp_path, teacher, source="student", trajectories=1).shards[0]
    plain, exact = (
        driven_by_hand(d, teacher.scheduler, shard["sample"][:1].to(d.dtype), 0, shard["omega"][0], 4)
        for d in (teacher.denoiser, double(teacher.denoiser))
    )
    assert_as_exact(shard["sample"], plain[0], exact[0])


@pytest.mark.parametrize("source", ["trajectories", "student"])
def test_collect_inside_guided_or_with_an_adapter_is_the_same(tmp_path, folder, trajectories, source):
    collect_tiny(tmp_path / "outside", with_adapter(), source=source)
    teacher = with_adapter()
    with agd.guided(teacher, 2.0):
        collect_tiny(tmp_path / "inside", teacher, source=source)
    assert contents(tmp_path / "inside") == contents(tmp_path / "outside")
    assert (contents(tmp_path / "inside") == contents(folder)) == (source == "trajectories")


def test_collect_from_the_student_needs_an_adapter(tmp_path):
    expected = "source='student' expects an adapter that is attached and not disabled, found"
    with pytest.raises(ValueError, match=f"{expected} none"):
        collect_tiny(tmp_path, source="student")
    teacher = with_adapter()
    with agd.disabled(teacher), pytest.raises(ValueError, match=f"{expected} it disabled"):
        collect_tiny(tmp_path, teacher, source="student")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("other", "entry"),
    [({"seed": 1}, "adapter.hash"), ({"identity_at_one": False}, "adapter.config.identity_at_one: expected False, found True")],
)
def test_collect_names_another_adapter_than_the_folders(tmp_path, other, entry):
    collect_tiny(tmp_path, with_adapter(), source="student")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"holds other trajectories .*{entry}"):
        collect_tiny(tmp_path, with_adapter(**other), source="student")
    with pytest.raises(ValueError, match="holds other trajectories .*adapter: expected None.*source: expected 'trajectories'"):
        collect_tiny(tmp_path, with_adapter())
    collect_tiny(tmp_path, with_adapter(), source="student")
    assert contents(tmp_path) == before


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
    "data",
    [
        (torch.zeros(3, 1, 5, 4), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 1, 4, 4), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, 1, 4, 4), torch.tensor([0, 1, 3])),
        None,
    ],
)
def test_collect_refuses_data_that_does_not_fit(tmp_path, data):
    with pytest.raises(ValueError, match=r"expected data of|expected condition rows in 0\.\.2|source='data' goes with"):
        collect_tiny(tmp_path, source="data", data=data)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    "change",
    [{"trajectories": 0}, {"steps": 0}, {"steps": (5, 4)}, {"keep": 0}, {"shard_size": 0}, {"source": "images"}],
)
def test_collect_refuses_numbers_out_of_range(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        collect_tiny(tmp_path, **change)
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


def test_collect_twice_gives_the_same_bytes(tmp_path, folder, trajectories):
    torch.manual_seed(5)  # the caller's random numbers do not matter
    collect_tiny(tmp_path)
    assert contents(tmp_path) == contents(folder)


def test_collect_leaves_the_random_numbers_of_the_caller_alone(tmp_path):
    teacher = tiny_teacher()
    before = torch.get_rng_state()
    collect_tiny(tmp_path, teacher)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_collect_remakes_one_shard_alone(copied, folder, index, written):
    name = f"shard-{index:05d}.safetensors"
    manifest = read_json(copied / "manifest.json")
    del manifest["files"][name]
    write_json(copied / "manifest.json", manifest)
    if not written:  # a kill may come between a shard and its entry
        (copied / name).unlink()
    teacher, calls = tiny_teacher(), []
    teacher.denoiser.register_forward_hook(lambda *_: calls.append(1))
    collect_tiny(copied, teacher)
    files, expected = contents(copied), contents(folder)
    found, wanted = (json.loads(part.pop("manifest.json")) for part in (files, expected))
    assert (files, found) == (expected, wanted)
    assert len(calls) == 4


def test_collect_again_does_nothing(copied, folder):
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 1, partial(pytest.fail, "the denoiser ran"))
    collect_tiny(copied, teacher)
    assert contents(copied) == contents(folder)


def test_collect_in_train_mode_is_the_same_and_restores_it(tmp_path, folder, trajectories):
    teacher = tiny_teacher()
    teacher.denoiser.train()
    collect_tiny(tmp_path, teacher)
    assert teacher.denoiser.training
    assert contents(tmp_path) == contents(folder)


def killed_in_a_forward(directory):
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 7, kill_self)  # the second of three shards
    collect_tiny(directory, teacher)


def killed_in_a_write(directory, ending):
    """Half of the second file with this ending, then SIGKILL."""
    import agd_fast.files

    written, whole = [], agd_fast.files.save_file

    def save_half(tensors, path, metadata):
        whole(tensors, path, metadata)
        written.append(path)
        if path.name == f".{ending}.partial":
            path.write_bytes(path.read_bytes()[:100])
            kill_self()

    agd_fast.files.save_file = save_half
    collect_tiny(directory)


def test_collect_continues_after_a_kill_in_a_forward(tmp_path, folder, trajectories):
    kill_in_child(killed_in_a_forward, tmp_path)
    assert sorted(read_json(tmp_path / "manifest.json")["files"]) == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match="unfinished: expected 3 shards, found 1"):
        Trajectories(tmp_path)
    teacher, calls = tiny_teacher(), []
    teacher.denoiser.register_forward_hook(lambda *_: calls.append(1))
    collect_tiny(tmp_path, teacher)
    assert len(calls) == 8  # two shards
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00001.safetensors"])
def test_collect_continues_after_a_kill_in_a_write(tmp_path, folder, trajectories, name):
    kill_in_child(killed_in_a_write, tmp_path, name)
    assert (tmp_path / f".{name}.partial").stat().st_size == 100
    assert not (tmp_path / name).exists()
    collect_tiny(tmp_path)
    assert contents(tmp_path) == contents(folder)


def truncated(path, other):
    path.write_bytes(path.read_bytes()[:-1])


def bit_flipped(path, other):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def missing(path, other):
    path.unlink()


def foreign(path, other):
    shutil.copy(other / path.name, path)


def foreign_and_unlisted(path, other):
    shutil.copy(other / path.name, path)
    manifest = read_json(path.parent / "manifest.json")
    del manifest["files"][path.name]
    write_json(path.parent / "manifest.json", manifest)


@pytest.mark.parametrize("damage", [truncated, bit_flipped, missing, foreign, foreign_and_unlisted])
@pytest.mark.parametrize("name", ["shard-00001.safetensors"])
def test_collect_and_trajectories_name_a_damaged_file(tmp_path, copied, name, damage):
    collect_tiny(tmp_path / "other", seed=1, labels=[2, 1, 0])
    damage(copied / name, tmp_path / "other")
    before = contents(copied)
    for read in (collect_tiny, Trajectories):
        with pytest.raises(ValueError, match=f"{copied / name} is (corrupted|listed|foreign)"):
            read(copied)
    assert contents(copied) == before


def test_collect_refuses_foreign_files_in_a_new_folder(tmp_path, folder, trajectories):
    shutil.copy(folder / "shard-00001.safetensors", tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/shard-00001.safetensors is foreign"):
        collect_tiny(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "format_version None; expected 2"),
        ('{"format_version": 3}', "format_version 3; expected 2"),
        ('{"format_version": 2}', "lacks the entries"),
    ],
)
def test_collect_and_trajectories_name_a_damaged_manifest(copied, content, message):
    (copied / "manifest.json").write_text(content)
    for read in (collect_tiny, Trajectories):
        with pytest.raises(ValueError, match=f"{copied / 'manifest.json'} .*{message}"):
            read(copied)


def test_trajectories_name_a_folder_without_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected a manifest.json in {tmp_path}"):
        Trajectories(tmp_path)


@pytest.mark.parametrize(
    ("change", "entries"),
    [
        ({"seed": 7}, ["seed: expected 7, found 0"]),
        ({"guidance_range": (1, 12)}, ["guidance_range"]),
        ({"steps": (4, 5), "keep": 2}, ["steps", "keep: expected 2, found None"]),
        ({"trajectories": 6}, ["trajectories: expected 6, found 5"]),
        ({"dtype": torch.float16}, ["dtype: expected 'float16', found 'float32'"]),
        ({"labels": [0, 1, 1]}, ["conditions.class_labels"]),
        ({"source": "data", "data": (torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))}, ["source", "data"]),
        ({"teacher": tiny_teacher(seed=1)}, ["model.hash"]),
    ],
)
def test_collect_names_what_differs_from_the_plan_in_the_folder(copied, folder, change, entries):
    with pytest.raises(ValueError, match="holds other trajectories") as error:
        collect_tiny(copied, **change)
    assert all(f"{entry}" in str(error.value) for entry in entries)
    assert "prediction_type" not in str(error.value)
    assert contents(copied) == contents(folder)


def test_collect_names_another_scheduler(copied):
    teacher = tiny_teacher()
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, beta_end=0.03)
    with pytest.raises(ValueError, match=r"scheduler.beta_end: expected 0.03, found 0.02"):
        collect_tiny(copied, teacher)


def test_collect_names_a_missing_null_condition(tmp_path):
    teacher = tiny_teacher()
    teacher.denoiser.register_to_config(num_embeds_ada_norm=None)
    with pytest.raises(ValueError, match="num_embeds_ada_norm"):
        collect(teacher, {"class_labels": torch.zeros(1, dtype=torch.long)}, tmp_path, progress=False)
    assert contents(tmp_path) == {}


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
