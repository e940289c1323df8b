"""Metrics against plain readings of their formulas, and the bars against adapters that must not clear them."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import agd_fast as agd
from agd_fast.demo import digits_reference
from agd_fast.evaluation import Reference, evaluate, frechet_distance, guidance_explained, precision_recall
from agd_fast.evaluation.bars import quality_bars, speed_bars
from agd_fast.evaluation.evaluate import arm_sampler, count_evaluations
from agd_fast.evaluation.speed import Timing, time_interleaved
from conftest import assert_as_exact, double, trained


@pytest.fixture
def teacher():
    return agd.datasets.digits_teacher()


def plain_frechet(a, b):
    """‖μ_a − μ_b‖² + Tr(Σ_a + Σ_b − 2(Σ_a^½ Σ_b Σ_a^½)^½), by symmetric eigendecomposition in the dtype of a and b."""
    a, b = a.numpy(), b.numpy()
    sa, sb = np.cov(a, rowvar=False, dtype=a.dtype), np.cov(b, rowvar=False, dtype=b.dtype)
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
    pairs = [(a, b), (b, a), (a, a), (b, b)]
    found = torch.tensor([frechet_distance(*pair) for pair in pairs])
    plain = torch.tensor([plain_frechet(*pair) for pair in pairs])
    reference = torch.tensor([plain_frechet(*(rows.double() for rows in pair)) for pair in pairs], dtype=torch.float64)
    assert_as_exact(found, plain, reference)


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


def explained_by_hand(denoiser, scheduler, states, start, labels, omega, steps, seed):
    """1 − Σ‖student − CFG‖² / Σ‖conditional − CFG‖² over all states, and at each t: [1 + steps]."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    errors, x = [], start
    with torch.no_grad():
        for t in scheduler.timesteps:
            if states == "data":
                x = scheduler.add_noise(start, torch.randn(start.shape, generator=generator).to(start), t[None])
            inputs = {"timestep": t.expand(len(x)), "class_labels": labels}
            cond = denoiser(x, **inputs).sample
            target = denoiser(x, **inputs | {"class_labels": torch.full_like(labels, 10)}).sample
            target = target + omega * (cond - target)
            with agd.guided(denoiser, omega):
                student = denoiser(x, **inputs).sample
            errors.append(torch.stack([(student - target).square().sum(), (cond - target).square().sum()]))
            if states != "data":
                x = scheduler.step(student if states == "student" else target, t, x).prev_sample
    sums = torch.stack([sum(errors), *errors])
    return 1 - sums[:, 0] / sums[:, 1]


@pytest.mark.parametrize("states", ["guided", "student", "data"])
def test_guidance_explained_is_the_plain_ratio(teacher, states):
    """Σ over all states of both squared errors, the states visited by hand."""
    trained(agd.attach(teacher, agd.AdapterConfig(kind="offset", hidden=8)), scale=0.05)
    omega, steps, seed, labels = 3.0, 5, 11, torch.tensor([4, 0, 4])
    start, options = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), {}
    table = {"class_labels": labels}
    if states == "data":
        start = agd.datasets.digits_images()[0][:3]
        table, options = {"class_labels": torch.tensor([4, 0])}, {"data": (start, torch.tensor([0, 1, 0]))}
    exact = dataclasses.replace(teacher, denoiser=double(teacher.denoiser))
    plain, reference = (
        explained_by_hand(model, teacher.scheduler, states, start.to(model.dtype), labels, omega, steps, seed)
        for model in (teacher.denoiser, exact.denoiser)
    )
    found = guidance_explained(exact, table, states=states, scales=(omega,), steps=steps, seed=seed, **options)
    assert_as_exact(torch.tensor([found.mean, *found.by_time.values()], dtype=torch.float64), plain, reference)
    assert list(found.by_time) == teacher.scheduler.timesteps.tolist()


@pytest.mark.parametrize("states", ["guided", "data"])
@pytest.mark.parametrize("scheduler", ["its own", "stochastic"])
def test_guidance_explained_of_two_adapters_is_on_the_same_states(teacher, states, scheduler):
    if scheduler == "stochastic":
        teacher.scheduler = DDPMScheduler.from_config(teacher.scheduler.config)
    options = {"states": states, "scales": (2.0, 4.0), "steps": 3, "batch_size": 4}
    if states == "data":
        options["data"] = (agd.datasets.digits_images()[0][:6], torch.arange(6))
    visited = []
    handle = teacher.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: visited[-1].append(state(kwargs)), with_kwargs=True
    )
    for adapter, seed in ((1, 5), (2, 5), (2, 6)):
        visited.append([])
        torch.manual_seed(adapter)
        trained(agd.attach(teacher))
        guidance_explained(teacher, {"class_labels": torch.arange(6)}, seed=seed, **options)
        agd.unload(teacher)
    handle.remove()
    first, second, other = (torch.cat(states) for states in visited)
    assert torch.equal(first, second)
    assert not torch.equal(second, other)


def state(kwargs):
    return next(value for value in kwargs.values() if value.ndim == 4).clone()


def test_guidance_explained_of_a_student_that_is_the_teacher(teacher):
    """It explains all, and what it drives are the guided trajectories themselves."""
    visited = {}

    def record(kind):
        visited[kind] = []

        def student(x, t, conditions, omega):
            visited[kind].append(x.clone())
            return teacher.predict_cfg(x, t, conditions, omega)[kind == "unguided"]

        return student

    options = {"scales": (2.0, 6.0), "steps": 4, "batch_size": 2}
    for kind, states, expected in (("guided", "guided", 1.0), ("driven", "student", 1.0), ("unguided", "student", 0.0)):
        found = guidance_explained(teacher, {"class_labels": torch.arange(3)}, student=record(kind), states=states, **options)
        assert found.mean == expected
        assert found.by_scale == dict.fromkeys((2.0, 6.0), expected)
        assert list(found.by_time.values()) == [expected] * 4
    guided, driven, unguided = (torch.cat(states) for states in visited.values())
    assert torch.equal(guided, driven)
    assert not torch.equal(driven, unguided)
    by_scale = unguided.unflatten(0, (2, -1))
    assert torch.equal(by_scale[0], by_scale[1])  # what an unguided student drives does not depend on ω


@pytest.mark.parametrize("states", ["guided", "student", "data"])
def test_guidance_explained_shows_a_student_every_state_with_its_condition(teacher, states):
    """More samples of data than conditions, in batches that do not divide them."""
    table, seen = {"class_labels": torch.tensor([7, 2, 5])}, []

    def student(x, t, conditions, omega):
        assert not torch.is_grad_enabled() and not teacher.denoiser.training
        seen.append((x, t, conditions["class_labels"], omega))
        return x

    rows, options = torch.arange(3), {}
    if states == "data":
        rows = torch.tensor([2, 0, 0, 1, 2])
        options["data"] = (torch.zeros(5, 1, 8, 8), rows)
    teacher.denoiser.train()
    guidance_explained(teacher, table, student=student, states=states, scales=(2.0, 3.0), steps=4, batch_size=2, **options)
    assert teacher.denoiser.training
    teacher.scheduler.set_timesteps(4)
    batches = [labels.tolist() for labels in table["class_labels"][rows].split(2)]
    expected = [(omega, labels, int(t)) for omega in (2.0, 3.0) for labels in batches for t in teacher.scheduler.timesteps]
    for (x, t, labels, omega), (scale, wanted, time) in zip(seen, expected, strict=True):
        count = len(wanted)
        assert x.shape == (count, 1, 8, 8)
        assert (t.tolist(), labels.tolist(), omega.tolist()) == ([time] * count, wanted, [scale] * count)


def test_guidance_explained_of_another_student_leaves_the_adapter_out(teacher):
    options = {"conditions": {"class_labels": torch.arange(3)}, "scales": (3.0,), "steps": 3, "states": "student"}

    def student(x, t, conditions, omega):
        return teacher.predict(x, t, conditions) * 0.5

    bare = guidance_explained(teacher, student=student, **options)
    trained(agd.attach(teacher))
    assert guidance_explained(teacher, student=student, **options) == bare
    own = guidance_explained(teacher, **options)
    assert own != bare
    assert guidance_explained(teacher, student=teacher.predict_agd, **options) == own


def test_guidance_explained_says_which_states(teacher):
    agd.attach(teacher)
    table, samples = {"class_labels": torch.arange(3)}, torch.zeros(2, 1, 8, 8)
    for options, message in (
        ({"states": "noised"}, "one of .*'guided', 'data', 'student'.*found 'noised', data None"),
        ({"states": "data"}, r"'data' with data=\(samples, condition rows\); found 'data', data None"),
        ({"data": (samples, torch.tensor([0, 1]))}, "found 'guided', data given"),
        ({"states": "data", "data": (samples, torch.tensor([0, 3]))}, r"expected condition rows in 0\.\.2, found 0\.\.3"),
    ):
        with pytest.raises(ValueError, match=message):
            guidance_explained(teacher, table, steps=2, **options)


class Elementwise(nn.Module):
    """Multiplies each element alone, so that a doubled batch rounds as a plain one does."""

    def __init__(self):
        super().__init__()
        self.label_embedding, self.site = nn.Embedding(5, 1), nn.Identity()

    def forward(self, x, t, label):
        return self.site(x * self.label_embedding(label)[..., None, None])


@pytest.mark.parametrize("states", ["guided", "student"])
def test_guidance_explained_of_a_zero_adapter_is_zero(states):
    condition = agd.Condition("label", embedding=("label_embedding",), null=0)
    site = agd.Site("site", width=3, channel_dim=1)
    spec = agd.DenoiserSpec(sample="x", timestep="t", conditions=(condition,), attention=(site,))
    teacher = agd.Teacher(Elementwise(), DDPMScheduler(), spec, sample_shape=(3, 4, 4))
    agd.attach(teacher, agd.AdapterConfig(kind="offset", hidden=4))
    found = guidance_explained(teacher, {"label": torch.arange(1, 5)}, states=states, steps=3)
    assert found.by_scale == found.strength_by_scale == dict.fromkeys((1.5, 2.0, 3.0, 4.0, 6.0), 0.0)


def test_the_strength_of_guidance_at_another_scale(teacher):
    """CFG at 1 + a·(ω − 1) guides a times as strongly as CFG at ω, and is off by (1 − a)² of it."""

    def student(x, t, conditions, omega):
        return teacher.predict_cfg(x, t, conditions, 1 + 0.8 * (omega - 1))[0]

    found = guidance_explained(teacher, {"class_labels": torch.arange(3)}, student=student, scales=(2.0, 5.0), steps=3)
    assert found.strength_by_scale == {2.0: pytest.approx(0.8, rel=1e-4), 5.0: pytest.approx(0.8, rel=1e-4)}
    assert found.by_scale == {2.0: pytest.approx(0.96, rel=1e-4), 5.0: pytest.approx(0.96, rel=1e-4)}


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


def test_timings_are_compared_round_by_round():
    fast, slow = Timing.of([1.0, 5.0, 2.0]), Timing.of([2.0, 10.0, 4.0])
    ratio = fast.over(slow)
    assert ratio.seconds == (0.5, 0.5, 0.5) and ratio.p20 == ratio.median == ratio.p80 == 0.5 and ratio.rounds == 3
    assert Timing.of([1.0, 4.0]).over(Timing.of([4.0, 2.0])).median == 1.125
    with pytest.raises(ValueError, match="shorter"):
        fast.over(Timing.of([1.0]))


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


def measured(result):
    """What does not depend on the clock."""
    return {**dataclasses.asdict(result), "environment": None}


SMALL = {
    "samples": 25,
    "guidance_scales": (2.0, 4.0),
    "steps": 3,
    "explained_trajectories": 12,
    "timing_rounds": 0,
    "progress": False,
}


def test_evaluate_with_conditions_is_that_with_class_labels(teacher):
    trained(agd.attach(teacher), scale=0.05)
    reference, labels = digits_reference(), [3, 0, 7, 7]
    found = evaluate(teacher, reference, conditions={"class_labels": torch.tensor(labels)}, class_labels=labels, **SMALL)
    assert measured(found) == measured(evaluate(teacher, reference, class_labels=labels, **SMALL))
    unjudged = evaluate(teacher, reference, conditions={"class_labels": torch.tensor(labels)}, **SMALL)
    assert unjudged.arms["agd"].class_accuracy is None
    assert unjudged.arms["agd"].frechet_distance == found.arms["agd"].frechet_distance


def test_a_time_is_that_of_the_images_that_were_made(teacher):
    agd.attach(teacher)
    settings = {**SMALL, "timing_rounds": 1, "timing_batch": 64, "guidance_scales": (2.0,)}
    result = evaluate(teacher, digits_reference(), class_labels=range(10), **settings)
    assert {name: arm.seconds_per_image * 25 for name, arm in result.arms.items()} == pytest.approx(
        {name: timing.median for name, timing in result.timing.items()}
    )


def test_evaluate_a_model_of_captions(unet):
    """Its prompts are cycled through, and each sample is judged by the class of its own prompt."""
    teacher = unet.teacher()
    trained(agd.attach(teacher, agd.AdapterConfig(hidden=2)))
    prompts, classes, seen = torch.randn(3, 5, 6), torch.tensor([2, 0, 1]), []
    expected = torch.arange(25) % 3

    def classify(images):
        wrong = (torch.arange(25) == 4).long()  # one of the 25
        return nn.functional.one_hot((classes[expected] + wrong) % 3, 3)

    unet.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    reference = Reference(torch.randn(30, 2, 4, 4), lambda images: images.flatten(1)[:, :4], classify)
    result = evaluate(teacher, reference, conditions={"encoder_hidden_states": prompts}, class_labels=classes, **SMALL)
    assert torch.equal(seen[0], prompts[expected])
    assert {name: arm.class_accuracy for name, arm in result.arms.items()} == dict.fromkeys(("unguided", "cfg", "agd"), 24 / 25)
    assert {name: arm.nfe for name, arm in result.arms.items()} == {"unguided": 3, "cfg": 6, "agd": 3}
    with pytest.raises(ValueError, match="one class label a row of conditions, found 2 and 3"):
        evaluate(teacher, reference, conditions={"encoder_hidden_states": prompts}, class_labels=[0, 1], **SMALL)
