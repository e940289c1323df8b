"""Sampling with diffusers' schedulers, and against diffusers' own pipeline."""

import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.dit import pipeline_dit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import agd_fast as agd
from conftest import TINY_SPEC, assert_as_exact, make_backbone, make_dit, trained

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpmsolver": DPMSolverMultistepScheduler,
    "flow": FlowMatchEulerDiscreteScheduler,
}
every_scheduler = pytest.mark.parametrize("scheduler", SCHEDULERS)


def with_adapter(backbone, scheduler="ddim"):
    teacher = backbone.teacher(SCHEDULERS[scheduler]())
    trained(agd.attach(teacher, agd.AdapterConfig(hidden=4)))
    return teacher


def forwards(denoiser):
    batches = []
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(next(iter(kwargs.values())))), with_kwargs=True
    )
    return batches


def conditions_of(backbone, count):
    name = backbone.spec.conditions[0].argument
    return {"conditions": {name: backbone.inputs(count)[name]}}


def test_sample_auto_takes_the_adapter_if_there_is_one(backbone):
    teacher, given_ = backbone.teacher(), conditions_of(backbone, 3)
    noise = torch.randn(3, *teacher.sample_shape)

    def sample(method):
        return agd.sample(teacher, **given_, guidance_scale=3.0, steps=3, noise=noise, method=method)

    cfg = sample("cfg")
    assert torch.equal(sample("auto"), cfg)
    trained(agd.attach(teacher, agd.AdapterConfig(hidden=4)))
    assert torch.equal(sample("auto"), sample("agd"))
    assert not torch.equal(sample("auto"), cfg)
    assert torch.equal(sample("cfg"), cfg)
    with agd.disabled(teacher):
        assert torch.equal(sample("auto"), cfg)
        with pytest.raises(ValueError, match=r"method='agd' expects an adapter .* found it disabled"):
            sample("agd")
    agd.unload(teacher)
    assert torch.equal(sample("auto"), cfg)


@pytest.mark.parametrize(("method", "scale", "batch"), [("agd", 3.0, 4), ("cfg", 3.0, 8), ("cfg", 1.0, 8), ("unguided", 3.0, 4)])
def test_sample_makes_one_forward_a_step(tiny, method, scale, batch):
    teacher = with_adapter(tiny)
    batches = forwards(tiny.denoiser)
    agd.sample(teacher, [1, 2, 3, 4], guidance_scale=scale, steps=5, method=method)
    assert batches == [batch] * 5


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "dpmsolver", "flow"])
def test_sample_with_agd_is_a_plain_loop_of_guided_forwards(tiny, scheduler):
    teacher = with_adapter(tiny, scheduler)
    noise, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    found = agd.sample(teacher, labels, guidance_scale=3.0, steps=4, noise=noise)
    loop = SCHEDULERS[scheduler]()
    loop.set_timesteps(4)
    x = noise if scheduler == "flow" else noise * loop.init_noise_sigma
    with torch.no_grad(), agd.guided(teacher, 3.0):
        for t in loop.timesteps:
            scaled = x if scheduler == "flow" else loop.scale_model_input(x, t)
            x = loop.step(tiny.denoiser(scaled, t.repeat(2), labels), t, x).prev_sample
    assert torch.equal(found, x)


class Elementwise(nn.Module):
    """Adds and multiplies each element alone, so that no result depends on the batch, not even by a rounding."""

    def __init__(self):
        super().__init__()
        self.label_embedding = nn.Embedding(5, 1)

    def forward(self, x, t, label):
        return x * self.label_embedding(label)[..., None, None]


@every_scheduler
def test_sample_does_not_depend_on_the_batch_size(scheduler):
    teacher = agd.Teacher(Elementwise(), SCHEDULERS[scheduler](), TINY_SPEC, sample_shape=(3, 4, 4))
    options = {"guidance_scale": [1.5, 2.0, 3.0, 4.0, 5.0], "steps": 3, "seed": 3}
    found = agd.sample(teacher, [1, 2, 3, 4, 1], **options)
    for size in (1, 2, 3):
        assert torch.equal(agd.sample(teacher, [1, 2, 3, 4, 1], batch_size=size, **options), found)


@every_scheduler
@pytest.mark.parametrize("method", ["agd", "cfg"])
def test_sample_is_reproducible_from_its_seed(tiny, scheduler, method):
    teacher = with_adapter(tiny, scheduler)

    def sample(seed):
        scales = [1.5, 2.0, 3.0, 4.0, 5.0]
        return agd.sample(teacher, [1, 2, 3, 4, 1], guidance_scale=scales, steps=3, seed=seed, method=method)

    found = sample(3)
    assert found.shape == (5, 3, 4, 4)
    assert found.isfinite().all()
    assert torch.equal(sample(3), found)
    assert not torch.equal(sample(4), found)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 6),
    batch_size=st.integers(1, 8),
    method=st.sampled_from(["agd", "cfg"]),
    scheduler=st.sampled_from(["ddim", "ddpm"]),
)
def test_sample_of_one_is_that_of_the_batch(count, batch_size, method, scheduler):
    torch.manual_seed(0)
    backbone = make_backbone("tiny")
    teacher = with_adapter(backbone, scheduler)
    labels, scales = torch.arange(count) % 4 + 1, torch.linspace(1.5, 5, count)
    found = agd.sample(teacher, labels, guidance_scale=scales, steps=2, seed=0, batch_size=batch_size, method=method)
    changed = scales.clone()
    changed[0] = 6.0
    other = agd.sample(teacher, labels, guidance_scale=changed, steps=2, seed=0, batch_size=batch_size, method=method)
    assert torch.equal(found[1:], other[1:])
    assert not torch.equal(found[0], other[0])


def test_sample_leaves_the_scheduler_and_the_global_generator_alone(tiny):
    teacher = with_adapter(tiny, "dpmsolver")
    before, state = copy.deepcopy(vars(teacher.scheduler)), torch.get_rng_state()
    agd.sample(teacher, [1], steps=3, seed=0)
    assert {k: str(v) for k, v in vars(teacher.scheduler).items()} == {k: str(v) for k, v in before.items()}
    assert torch.equal(torch.get_rng_state(), state)


def test_sample_takes_a_scheduler_beside_the_model(dit):
    noise = torch.randn(1, 2, 4, 4)
    of_teacher = agd.sample(dit.teacher(EulerDiscreteScheduler()), [3], steps=2, noise=noise)
    assert torch.equal(agd.sample(dit.denoiser, [3], steps=2, noise=noise, scheduler=EulerDiscreteScheduler()), of_teacher)
    assert torch.equal(agd.sample(dit.teacher(), [3], steps=2, noise=noise, scheduler=EulerDiscreteScheduler()), of_teacher)


@pytest.mark.parametrize("method", ["cfg", "unguided"])
def test_sample_of_the_base_inside_guided_is_double_guidance(tiny, method):
    teacher = with_adapter(tiny)
    with agd.guided(teacher, 3.0), pytest.raises(RuntimeError, match=r"double guidance"):
        agd.sample(teacher, [1], steps=2, method=method)


def test_sample_unguided_is_a_plain_loop_of_the_base(tiny):
    teacher, loop = with_adapter(tiny), DDIMScheduler()
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([1, 2])
    found = agd.sample(teacher, labels, guidance_scale=3.0, steps=4, noise=x, method="unguided")
    loop.set_timesteps(4)
    with torch.no_grad():
        for t in loop.timesteps:
            x = loop.step(tiny.denoiser(x, t.repeat(2), labels), t, x).prev_sample
    assert torch.equal(found, x)


def test_sample_with_cfg_follows_the_teachers_rule(tiny):
    """Also at ω = 1, where another rule need not give ε(c)."""
    labels, noise = torch.tensor([1, 2]), torch.randn(2, 3, 4, 4)

    def unconditional(uncond, cond, omega):
        return uncond

    options = {"steps": 3, "noise": noise, "guidance_scale": 1.0, "method": "cfg"}
    found = agd.sample(tiny.teacher(guidance=unconditional), labels, **options)
    plain = tiny.teacher()
    options["guidance_scale"] = 0.0
    assert torch.equal(found, agd.sample(plain, labels, **options))  # ε(∅) + 0·(ε(c) − ε(∅))
    options["guidance_scale"] = 1.0
    assert not torch.equal(found, agd.sample(plain, labels, **options))


def test_sample_says_what_is_wrong(dit):
    teacher = dit.teacher()
    with pytest.raises(ValueError, match=r"one of 'auto', 'agd', 'cfg', 'unguided'; found 'apg'"):
        agd.sample(teacher, [1], method="apg")
    with pytest.raises(ValueError, match=r"method='agd' expects an adapter .* found none"):
        agd.sample(teacher, [1], method="agd")
    with pytest.raises(ValueError, match=r"missing \['class_labels'\]"):
        agd.sample(teacher)
    with pytest.raises(ValueError, match=r"one guidance_scale or 3, found \(3, 2, 4, 4\) and 2"):
        agd.sample(teacher, [1, 2, 3], guidance_scale=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"expected noise \(3, 2, 4, 4\) .* found \(2, 2, 4, 4\) and 1"):
        agd.sample(teacher, [1, 2, 3], noise=torch.randn(2, 2, 4, 4))
    with pytest.raises(TypeError, match=r"found a bare DiTTransformer2DModel"):
        agd.sample(dit.denoiser, [1])


def test_sample_outside_the_trained_range_warns(tiny):
    with pytest.warns(UserWarning, match=r"ω from 9 to 9 lies outside \[1, 6\]"):
        agd.sample(with_adapter(tiny), [1], guidance_scale=9.0, steps=1)


def make_pipeline(scheduler, dtype=torch.float32):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=2, scaling_factor=1.0)
    pipe = DiTPipeline(make_dit(num_embeds_ada_norm=1000), vae, SCHEDULERS[scheduler]()).to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipeline_latents(monkeypatch):
    def run(pipe, labels, guidance_scale, noise):
        latents = []
        monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, dtype, **__: noise.to(dtype))
        pipe.vae.decode = lambda z: latents.append(z) or SimpleNamespace(sample=z)
        pipe(labels, guidance_scale, num_inference_steps=4, output_type="pt")
        return latents[0]

    return run


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver"])  # DiTPipeline steps from the scaled input: wrong for Euler
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_sample_cfg_is_the_pipelines(pipeline_latents, scheduler, scale):
    pipe, labels, noise = make_pipeline(scheduler), [1, 4, 2], torch.randn(3, 2, 4, 4)
    found = agd.sample(pipe, labels, guidance_scale=scale, steps=4, noise=noise, method="cfg")
    plain = pipeline_latents(pipe, labels, scale, noise)
    assert_as_exact(found, plain, pipeline_latents(make_pipeline(scheduler, torch.float64), labels, scale, noise))


def test_guided_pipeline_without_its_own_guidance_is_sample_with_agd(pipeline_latents):
    pipe, noise = make_pipeline("ddim"), torch.randn(2, 2, 4, 4)
    trained(agd.attach(pipe, agd.AdapterConfig(hidden=4)))
    found = agd.sample(pipe, [1, 2], guidance_scale=[3.0, 5.0], steps=4, noise=noise)
    with agd.guided(pipe, [3.0, 5.0]):
        assert torch.equal(pipeline_latents(pipe, [1, 2], 1.0, noise), found)
        with pytest.raises(ValueError, match=r"expected guidance_scale left out or 1, found 3.0 \(double guidance\)"):
            pipeline_latents(pipe, [1, 2], 3.0, noise)
    agd.unload(pipe)
    with pytest.raises(ValueError, match=r"no adapter"), agd.guided(pipe, 3.0):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "must be at least 1, found 0"),
        ({"batch_size": 0}, "must be at least 1, found 4 and 0"),
        ({"noise": torch.zeros(2, 3, 4, 5)}, r"expected noise \(2, 3, 4, 4\).*found \(2, 3, 4, 5\)"),
        ({"class_labels": [1.5, 2.0]}, "must be integers"),
    ],
)
def test_sample_names_what_does_not_fit(tiny, change, message):
    with pytest.raises(ValueError, match=message):
        agd.sample(tiny.teacher(), **{"class_labels": [1, 2], "steps": 4, **change})


def test_sample_takes_one_label(tiny):
    assert agd.sample(tiny.teacher(), 3, steps=2).shape == (1, 3, 4, 4)
