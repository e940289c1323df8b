"""Metrics against plain readings of their formulas, and the bars against adapters that must not clear them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.demo import digits_reference
from agd_fast.evaluation import evaluate, frechet_distance, guidance_explained, precision_recall
from agd_fast.evaluation.bars import quality_bars, speed_bars
from agd_fast.evaluation.evaluate import arm_sampler, count_evaluations
from agd_fast.evaluation.speed import time_interleaved
from conftest import trained


@pytest.fixture
def teacher():
    return agd.datasets.digits_teacher()


def plain_frechet(a, b):
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2(Σ_a^½ Σ_b Σ_a^½)^½), by symmetric eigendecomposition."""
    a, b = a.double().numpy(), b.double().numpy()
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(sa)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ sb @ root).clip(0)).sum()
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa) + np.trace(sb) - 2 * cross


@settings(max_examples=20, deadline=None)
@given(width=st.integers(2, 24), rows=st.integers(50, 200), shift=st.floats(0, 3), seed=st.integers(0, 999))
def test_frechet_distance(width, rows, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rows, width, generator=generator)
    b = torch.randn(rows + 7, width, generator=generator) * 1.5 + shift
    expected = plain_frechet(a, b)
    found = frechet_distance(a, b)
    # torchmetrics takes eigenvalues of a nonsymmetric product: the root of float64's resolution is what is left
    assert math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-6 * width)
    assert abs(frechet_distance(a, a)) < 1e-6 * width


def test_frechet_distance_names_shapes():
    with pytest.raises(ValueError, match=r"\(5, 3\), \(5, 4\)"):
        frechet_distance(torch.zeros(5, 3), torch.zeros(5, 4))


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(5, 30), others=st.integers(5, 30), k=st.integers(1, 4), seed=st.integers(0, 999))
def test_precision_recall(rows, others, k, seed):
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.randn(rows, 3, generator=generator).double(), torch.randn(others, 3, generator=generator).double() + 0.5

    def share(samples, manifold):
        inside = 0
        for sample in samples:
            for point in manifold:
                radius = sorted((point - other).norm().item() for other in manifold)[k]
                if (sample - point).norm().item() <= radius * (1 + 1e-12):
                    inside += 1
                    break
        return inside / len(samples)

    assert precision_recall(real, fake, k) == (share(fake, real), share(real, fake))


def test_precision_recall_of_the_same_and_of_the_apart():
    real = torch.randn(50, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(real[:3], real)


def test_guidance_explained_is_the_plain_ratio(teacher):
    """One trajectory by hand: Σ over its states of both squared errors."""
    trained(agd.attach(teacher, agd.AdapterConfig(kind="offset", hidden=8)), scale=0.05)
    omega, steps, labels = 3.0, 5, torch.tensor([4])
    found = guidance_explained(teacher, {"class_labels": labels}, scales=(omega,), steps=steps, seed=11)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(11))
    scheduler = teacher.scheduler
    scheduler.set_timesteps(steps)
    errors, by_time = torch.zeros(2), {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            cond = teacher.denoiser(x, timestep=t[None], class_labels=labels).sample
            null = teacher.denoiser(x, timestep=t[None], class_labels=torch.tensor([10])).sample
            target = null + omega * (cond - null)
            with agd.guided(teacher, omega):
                student = teacher.denoiser(x, timestep=t[None], class_labels=labels).sample
            here = torch.stack([(student - target).square().sum(), (cond - target).square().sum()])
            errors += here
            by_time[float(t)] = 1 - (here[0] / here[1]).item()
            x = scheduler.step(target, t, x).prev_sample
    assert found.mean == pytest.approx(1 - (errors[0] / errors[1]).item(), rel=1e-4)
    assert found.by_time == pytest.approx(by_time, rel=1e-3)


def test_guidance_explained_of_a_zero_adapter_is_zero(teacher):
    agd.attach(teacher)
    found = guidance_explained(teacher, {"class_labels": torch.arange(10)}, steps=3)
    assert set(found.by_scale) == {1.5, 2.0, 3.0, 4.0, 6.0}
    assert all(abs(value) < 1e-5 for value in found.by_scale.values())  # a doubled batch rounds unlike a plain one


def test_count_evaluations(teacher):
    agd.attach(teacher)
    labels, noise = torch.arange(5), torch.randn(5, 1, 8, 8)
    counts = {}
    for arm in ("unguided", "cfg", "agd"):
        with count_evaluations(teacher.denoiser) as count:
            arm_sampler(teacher, arm, labels, noise, 3.0, 4, 2)()
        counts[arm] = count[0] / len(labels)
    assert counts == {"unguided": 4, "cfg": 8, "agd": 4}


def test_time_interleaved_turns_the_order():
    calls = []
    arms = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    timing = time_interleaved(arms, rounds=3, warmup=0)
    assert "".join(calls) == "abcbcacab"
    assert all(entry.rounds == 3 and entry.p20 <= entry.median <= entry.p80 for entry in timing.values())


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory):
    """A teacher with an adapter that was trained for 20 steps."""
    teacher = agd.datasets.digits_teacher()
    config = agd.TrainConfig(steps=20, checkpoint_every=20)
    directory = tmp_path_factory.mktemp("twenty")
    agd.distill(teacher, class_labels=range(10), output_dir=directory, train_config=config, trajectories=50, progress=False)
    return teacher


@pytest.mark.parametrize("trained", ["zero", "twenty steps"])
def test_weak_adapters_miss_the_bars(teacher, twenty_steps, trained):
    if trained == "zero":
        agd.attach(teacher)
    else:
        teacher = twenty_steps
    result = evaluate(
        teacher,
        digits_reference(),
        class_labels=range(10),
        samples=400,
        guidance_scales=(2.0, 3.0, 4.0),
        timing_rounds=2,
        timing_batch=4,
        explained_trajectories=20,
        progress=False,
    )
    missed = {bar.name for bar in quality_bars(result) if not bar.cleared}
    assert {"guidance explained", "RMSE to CFG, AGD / unguided"} <= missed
    assert not any("guidance matters" in name for name in missed)
    assert [bar.name for bar in speed_bars(result)] == ["seconds, unguided / AGD"]
    assert result.arms["cfg"].nfe == 50 and result.arms["agd"].nfe == result.arms["unguided"].nfe == 25


def test_evaluate_needs_an_adapter(teacher):
    with pytest.raises(ValueError, match="no adapter is attached"):
        evaluate(teacher, digits_reference(), class_labels=range(10), samples=20, progress=False)
