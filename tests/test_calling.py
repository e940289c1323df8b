"""The call of a wrapped pipeline."""

import inspect

import pytest
import torch
from diffusers import StableDiffusionPipeline

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, share
from helpers_families import attach_trained, run, watched
from helpers_pipelines import SCALE, attach, forwards, no_warnings, quiet, sample
from tiny import FAMILIES, sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]


# one forward a step


def test_a_wrapped_call_makes_half_the_forwards(pipe):
    with forwards(pipe) as seen:
        base = sample(pipe, SD15, 2, guidance_scale=SCALE)
    assert seen == [4] * STEPS
    attach(pipe)
    with forwards(pipe) as seen, no_warnings():
        found = sample(pipe, SD15, 2, guidance_scale=SCALE)
    assert seen == [2] * STEPS
    assert found.shape == base.shape and not torch.equal(found, base)
    assert quiet(pipe)


def test_a_wrapped_call_is_the_denoiser_guided_by_hand(wrapped):
    found = sample(wrapped, SD15, guidance_scale=SCALE)
    with agd.guided(wrapped.unet, SCALE), torch.no_grad():
        by_hand = StableDiffusionPipeline.__call__(
            wrapped, **SD15.inputs(1), **SD15.call, guidance_scale=1.0, generator=torch.Generator().manual_seed(3)
        )[0]
    assert torch.equal(found, by_hand)


def test_guidance_scale_defaults_to_the_pipelines_own(wrapped):
    with pytest.warns(UserWarning, match=r"7\.5 to 7\.5 lies outside \[1, 6\]"):
        found = sample(wrapped, SD15)
    with pytest.warns(UserWarning, match="lies outside"):
        assert torch.equal(sample(wrapped, SD15, guidance_scale=7.5), found)


def test_guidance_scale_may_be_positional(wrapped):
    names = list(inspect.signature(StableDiffusionPipeline.__call__).parameters)[1:]
    arguments = {**SD15.inputs(1), **SD15.call, "timesteps": None, "sigmas": None, "guidance_scale": SCALE}
    before = names[: names.index("guidance_scale") + 1]
    rest = {name: value for name, value in arguments.items() if name not in before}
    with torch.no_grad():
        found = wrapped(*(arguments[name] for name in before), **rest, generator=torch.Generator().manual_seed(3))[0]
    assert torch.equal(found, sample(wrapped, SD15, guidance_scale=SCALE))


def test_omega_outside_the_trained_range_warns_once_and_points_at_the_caller(wrapped):
    with pytest.warns(UserWarning, match="lies outside") as seen:
        torch.no_grad()(wrapped.__call__)(**SD15.inputs(1), **SD15.call, guidance_scale=9.0)
    assert len(seen) == 1
    with no_warnings():
        sample(wrapped, SD15, guidance_scale=6.0)


# the base


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_scale_of_one_is_the_base_without_guidance(pipe, scale):
    base = sample(pipe, SD15, guidance_scale=scale)
    attach(pipe, identity_at_one=False)
    with forwards(pipe) as seen, no_warnings():
        assert torch.equal(sample(pipe, SD15, guidance_scale=scale), base)
    assert seen == [1] * STEPS


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_scales_by_which_a_pipeline_does_not_guide_are_none_whatever_omega_they_have(scale):
    """Cosmos 2.5 guides for g > 1 alone, at ω = g + 1."""
    family = FAMILIES["cosmos"]
    pipe = family.pipeline()
    base = run(pipe, family, guidance_scale=scale)
    with watched(pipe) as above:
        run(pipe, family, guidance_scale=1.001)
    assert [len(step) for step in above.steps] == [2] * STEPS
    attach_trained(pipe, guidance_range=(2.0, 6.0))
    assert torch.equal(run(pipe, family, guidance_scale=scale), base)
    mixed = run(pipe, family, guidance_scale=[scale, 4.0])
    assert torch.equal(mixed[0], base[0]) and not torch.equal(mixed[1], base[1])


def test_scales_that_no_pipeline_guides_by_are_without_guidance_in_a_batch_and_a_schedule_too(pipe):
    base = sample(pipe, SD15, 2, guidance_scale=1.0)
    attach(pipe)
    with no_warnings():
        mixed = sample(pipe, SD15, 2, guidance_scale=[0.5, SCALE])
        assert torch.equal(sample(pipe, SD15, 2, guidance_scale=lambda done: 0.5), base)
    assert torch.equal(mixed[0], base[0]) and not torch.equal(mixed[1], base[1])


@pytest.mark.parametrize(("name", "lowest"), [("cosmos", 0.1), ("sd15", 0.5)])
def test_an_adapter_acts_at_all_scales_it_was_trained_at(name, lowest):
    """A guider teaches where the pipeline itself does not guide."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    base = run(pipe, family, guidance_scale=0.0)
    attach_trained(pipe, guidance_range=(lowest + family.omega_offset, 6.0))
    for scale in (lowest, 0.9):
        with no_warnings():
            alone = run(pipe, family, guidance_scale=scale)
            mixed = run(pipe, family, guidance_scale=[0.0, scale])
        with agd.guided(pipe, scale):
            assert torch.equal(run(pipe, family), alone)
        assert torch.equal(mixed[0], base[0]) and not torch.equal(alone, base)
        assert torch.equal(mixed[1], alone[1])


def test_disabled_is_the_bases_own_guidance(pipe):
    base = sample(pipe, SD15, guidance_scale=SCALE, negative_prompt=["blurred"])
    attach(pipe)
    with agd.disabled(pipe), forwards(pipe) as seen, no_warnings():
        assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE, negative_prompt=["blurred"]), base)
    assert seen == [2] * STEPS


def test_unload_restores_the_class(pipe):
    base = sample(pipe, SD15, guidance_scale=SCALE)
    attach(pipe)
    assert agd.unload(pipe) is pipe
    assert type(pipe) is StableDiffusionPipeline
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), base)


def test_a_sharing_pipeline_is_its_own_again_once_the_adapter_is_unloaded(pipe):
    other = StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    base = sample(other, SD15, guidance_scale=SCALE)
    attach(pipe)
    share(pipe, other)
    assert not torch.equal(sample(other, SD15, guidance_scale=SCALE), base)
    agd.unload(pipe)
    assert torch.equal(sample(other, SD15, guidance_scale=SCALE), base)


def test_a_wrapped_class_passes_for_its_own(pipe):
    other, call = SD15.pipeline(), StableDiffusionPipeline.__call__
    attach(pipe)
    found = type(pipe)
    assert found is not StableDiffusionPipeline
    assert isinstance(pipe, StableDiffusionPipeline)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(found, name) == getattr(StableDiffusionPipeline, name)
    assert inspect.signature(found.__call__) == inspect.signature(call)
    assert StableDiffusionPipeline.__call__ is call
    assert type(other) is StableDiffusionPipeline
    with forwards(other) as seen:
        sample(other, SD15, guidance_scale=SCALE)
    assert seen == [2] * STEPS


def test_attach_twice_is_an_error_and_leaves_the_first(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with pytest.raises(ValueError, match="already has an adapter"):
        attach(wrapped)
    assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE), expected)


# inside guided


def test_inside_guided_the_pipelines_guidance_is_off(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with agd.guided(wrapped, SCALE), forwards(wrapped) as seen:
        assert torch.equal(sample(wrapped, SD15), expected)
        assert torch.equal(sample(wrapped, SD15, guidance_scale=1.0), expected)
        for scale in (SCALE, 7.5, [SCALE]):
            with pytest.raises(ValueError, match=r"agd_fast.guided\(...\) decides the guidance scale.*double guidance"):
                sample(wrapped, SD15, guidance_scale=scale)
        assert torch.equal(sample(wrapped, SD15), expected)
    assert seen == [1] * (3 * STEPS)
    assert quiet(wrapped)


def test_inside_guided_an_interval_applies_and_the_scale_comes_back(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE, guidance_interval=(0.5, 1.0))
    with agd.guided(wrapped, SCALE):
        assert torch.equal(sample(wrapped, SD15, guidance_interval=(0.5, 1.0)), expected)
        assert attachment_of(wrapped).omega.tolist() == [SCALE]


# what a call leaves behind


@pytest.mark.parametrize("where", ["forward", "step", "decode", "arguments"])
def test_an_exception_inside_a_call_leaves_everything_disarmed(wrapped, where, monkeypatch):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    arguments = {"guidance_scale": SCALE, "guidance_interval": (0.0, 0.5)}
    with monkeypatch.context() as patch, pytest.raises((ZeroDivisionError, ValueError)):
        if where == "forward":
            patch.setattr(wrapped.unet.mid_block, "forward", lambda *_, **__: 1 / 0)
        elif where == "step":
            patch.setattr(type(wrapped.scheduler), "step", lambda *_, **__: 1 / 0)
        elif where == "decode":
            patch.setattr(wrapped.vae, "decode", lambda *_, **__: 1 / 0)
            arguments["output_type"] = "pt"
        else:
            arguments["height"] = 15  # no multiple of 8
        sample(wrapped, SD15, **arguments)
    assert quiet(wrapped)
    assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE), expected)


def test_callback_on_step_end_sees_every_step_and_may_change_latents(wrapped):
    seen = []

    def callback(pipe, step, t, tensors):
        assert pipe is wrapped
        seen.append((step, attachment_of(pipe).omega.tolist()))
        return {"latents": tensors["latents"] * 0} if step == STEPS - 1 else {}

    found = sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=callback)
    assert seen == [(step, [SCALE]) for step in range(STEPS)]
    assert not found.any()


# pipelines with two denoisers, and with a guider


def test_wan_22_arms_each_denoiser_with_its_own_scale():
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    attach(pipe)
    for component in components_of(pipe, attachment_of(pipe).spec).values():
        with torch.no_grad():
            for parameter in attachment_of(component).adapter.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.3)
    with forwards(pipe.transformer) as first, forwards(pipe.transformer_2) as second:
        both = sample(pipe, family, guidance_scale=4.0, guidance_scale_2=3.0)
        assert first and second
        assert [*first, *second] == [1] * 4
    assert torch.equal(sample(pipe, family, guidance_scale=4.0), sample(pipe, family, guidance_scale=4.0, guidance_scale_2=4.0))
    for other in ({"guidance_scale": 2.0, "guidance_scale_2": 3.0}, {"guidance_scale": 4.0, "guidance_scale_2": 5.0}):
        assert not torch.equal(sample(pipe, family, **other), both)
    two = sample(pipe, family, 2, guidance_scale=[4.0, 2.0], guidance_scale_2=[3.0, 3.0])
    assert not torch.equal(two, sample(pipe, family, 2, guidance_scale=4.0, guidance_scale_2=3.0))
    agd.unload(pipe)
    assert attachment_of(pipe.transformer_2) is None


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_without_a_first_scale_wan_22_has_no_second_one(first):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    given = {"guidance_scale": first, "guidance_scale_2": 4.0}
    base = run(pipe, family, **given)
    attach_trained(pipe)
    assert torch.equal(run(pipe, family, **given), base)
    assert not torch.equal(run(pipe, family, **{**given, "guidance_scale": 4.0}), base)


def test_hunyuanvideo_15_takes_the_scale_in_the_call_or_from_its_guider():
    family = FAMILIES["hunyuanvideo15"]
    pipe = family.pipeline()
    attach_trained(pipe)
    guider = pipe.guider
    with forwards(pipe) as seen, no_warnings():
        found = sample(pipe, family, guidance_scale=3.0)
    assert seen == [1] * 4
    assert pipe.guider is guider and guider.guidance_scale == 4.0
    guider.guidance_scale = 3.0
    assert torch.equal(sample(pipe, family), found)
    assert not torch.equal(sample(pipe, family, guidance_scale=5.0), found)
    with agd.guided(pipe, 3.0):
        assert torch.equal(sample(pipe, family), found)
        with pytest.raises(ValueError, match="double guidance"):
            sample(pipe, family, guidance_scale=5.0)
    with agd.disabled(pipe), forwards(pipe) as seen:
        sample(pipe, family)
    assert seen == [1] * 8  # one forward a condition
    with forwards(pipe) as seen:
        unguided = sample(pipe, family, guidance_scale=1.0)
    assert seen == [1] * 4
    pipe.guider = guider.new(enabled=False)
    assert torch.equal(sample(pipe, family), unguided)


def test_prompts_with_and_without_quotes_have_each_a_guider_at_the_calls_scale():
    pipe = FAMILIES["hunyuan_image"].pipeline()
    quoted = {**FAMILIES["hunyuan_image"].call, "prompt": ['a ship "red"']}
    attach(pipe)
    for arguments in ({"prompt": ["a ship"]}, {"prompt": ['a ship "red"']}):
        with forwards(pipe) as seen, no_warnings():
            found = pipe(**{**quoted, **arguments}, generator=torch.Generator().manual_seed(0), guidance_scale=3.0)[0]
        assert seen == [1] * 4
        again = pipe(**{**quoted, **arguments}, generator=torch.Generator().manual_seed(0), guidance_scale=5.0)[0]
        assert not torch.equal(again, found)
    assert (pipe.guider.guidance_scale, pipe.ocr_guider.guidance_scale) == (4.0, 2.0)
    with agd.disabled(pipe), forwards(pipe) as seen:
        two = [pipe(**quoted, generator=torch.Generator().manual_seed(0), **own)[0] for own in ({}, {"guidance_scale": 2.0})]
    assert seen == [1] * 16
    assert torch.equal(*two)  # each guider has its own scale where the call has none
    agd.unload(pipe)
    pipe.guider = pipe.ocr_guider = None
    with pytest.raises(ValueError, match="expected a guider of diffusers as guider or ocr_guider of this HunyuanImagePipeline"):
        agd.pipelines.PipelineTeacher.of(pipe, inputs={"prompt": ["a ship"]})
