"""Collecting states that the teacher does not visit itself: noised data, and a student's own."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import agd_fast as agd
from conftest import assert_as_exact, double, trained
from helpers_distillation import collect_tiny, contents, rows_of, small, tiny_teacher


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
