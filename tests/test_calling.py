"""The call of a wrapped pipeline, and of Modular Diffusers with the adapter as its guider."""

import inspect
import warnings
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    ClassifierFreeGuidance,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
)
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of, components_of, share
from agd_fast.attaching.hooks import prepare_forward
from agd_fast.guiders import AdapterGuidance
from conftest import assert_as_exact
from helpers_pipelines import SCALE, attach, exact, forwards, noise, sample
from tiny import FAMILIES, sd15, sdxl

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]


@pytest.fixture
def pipe():
    return SD15.pipeline()


@pytest.fixture
def wrapped():
    pipe = SD15.pipeline()
    attach(pipe)
    return pipe


def quiet(pipe):
    """A pipeline in which a call left nothing behind: disarmed, without hooks of ours, with the scheduler's own step."""
    attachment = attachment_of(pipe)
    hooks = list(pipe.unet._forward_pre_hooks.values())
    return attachment.omega is None and attachment.enabled and hooks == [prepare_forward] and "step" not in vars(pipe.scheduler)


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


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


# scales per prompt


@pytest.mark.parametrize("images", [1, 2])
def test_scales_per_prompt_equal_single_calls(wrapped, images):
    scales, prompts = [2.0, 5.0, 3.5], SD15.inputs(3)["prompt"]
    latents = noise(3 * images)
    reference = exact(wrapped)

    def single(pipe, latents):
        rows = latents.split(images)
        several = {"num_images_per_prompt": images}
        return torch.cat(
            [
                sample(pipe, SD15, prompt=prompt, guidance_scale=scale, latents=row, **several)
                for prompt, scale, row in zip(prompts, scales, rows, strict=True)
            ]
        )

    found = sample(wrapped, SD15, 3, guidance_scale=scales, latents=latents, num_images_per_prompt=images)
    assert_as_exact(found, single(wrapped, latents), single(reference, latents.double()))
    assert not torch.equal(found, sample(wrapped, SD15, 3, guidance_scale=3.5, latents=latents, num_images_per_prompt=images))


def test_scales_per_prompt_take_embeddings_and_tensors(wrapped):
    embeddings = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"prompt": None, "prompt_embeds": embeddings, "latents": noise(2)}
    found = sample(wrapped, SD15, guidance_scale=[2.0, 5.0], **given)
    assert torch.equal(sample(wrapped, SD15, guidance_scale=torch.tensor([2.0, 5.0]), **given), found)
    assert torch.equal(found[:1], sample(wrapped, SD15, guidance_scale=[2.0, 2.0], **given)[:1])
    assert not torch.equal(found[1:], sample(wrapped, SD15, guidance_scale=2.0, **given)[1:])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt": "red cat", "guidance_scale": [2.0, 3.0]}, r"guidance_scale has 2 values for 1 prompt\(s\)"),
        ({"prompt": ["red cat"] * 3, "guidance_scale": [2.0, 3.0]}, r"guidance_scale has 2 values for 3 prompt\(s\)"),
        ({"guidance_scale": [2.0, 3.0]}, r"2 values for an unknown number of prompt\(s\)"),
        ({"prompt": "red cat", "guidance_scale": None}, "expected guidance_scale=..., a number or one a prompt; found None"),
        ({"prompt": "red cat", "guidance_scale": float("nan")}, "one finite guidance scale"),
        ({"prompt": "red cat", "guidance_scale": [[2.0], [3.0]]}, r"found shape \(2, 1\)"),
    ],
)
def test_scales_that_do_not_go_with_the_prompts_are_an_error(wrapped, given, message):
    with pytest.raises(ValueError, match=message):
        wrapped(**given, **SD15.call)
    assert quiet(wrapped)


# guidance_interval


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.75), (0.0, 0.5), (0.3, 1.0), (0.26, 0.49)])
def test_guidance_interval_equals_switching_by_hand(wrapped, interval):
    steps = 7
    attachment, step, armed = attachment_of(wrapped), 0, []

    def switch(pipe, index, t, tensors):
        armed.append(attachment.omega is not None)
        attachment.omega = omega if inside(index + 1) else None
        return tensors

    def inside(index):
        return int(interval[0] * steps) <= index < int(interval[1] * steps)

    found = sample(wrapped, SD15, guidance_scale=SCALE, num_inference_steps=steps, guidance_interval=interval)
    assert quiet(wrapped)
    omega = torch.tensor([SCALE])
    with agd.guided(wrapped, SCALE), torch.no_grad():
        attachment.omega = omega if inside(step) else None
        given = {**SD15.call, "num_inference_steps": steps, "guidance_scale": 1.0, "callback_on_step_end": switch}
        by_hand = StableDiffusionPipeline.__call__(
            wrapped, **SD15.inputs(1), **given, generator=torch.Generator().manual_seed(3)
        )[0]
    assert armed == [inside(index) for index in range(steps)]
    assert torch.equal(found, by_hand)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1)])
def test_bad_guidance_interval_is_an_error(wrapped, interval):
    with pytest.raises(ValueError, match=r"guidance_interval must be \(start, stop\).*found \(") as caught:
        sample(wrapped, SD15, guidance_scale=SCALE, guidance_interval=interval)
    assert str(interval) in str(caught.value)
    assert quiet(wrapped)


# negative prompts


@pytest.mark.parametrize("negative", ["blurred", ["blurred"], None, "", [""]])
def test_negative_prompt_is_left_out_with_a_warning(wrapped, negative):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with pytest.warns(UserWarning, match="negative prompt is left out") if negative not in (None, "", [""]) else no_warnings():
        assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, negative_prompt=negative), expected)


def test_negative_embeddings_are_left_out_with_a_warning(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with pytest.warns(UserWarning, match="negative prompt is left out"):
        found = sample(wrapped, SD15, guidance_scale=SCALE, negative_prompt_embeds=torch.zeros(1, 16, 16))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [SCALE, [SCALE, SCALE], torch.tensor([SCALE, SCALE])])
def test_negative_cfg_is_the_bases_own_guidance(pipe, scale):
    arguments = {"negative_prompt": ["blurred", "pale"], "guidance_scale": SCALE}
    base = sample(pipe, SD15, 2, **arguments)
    attach(pipe)
    with forwards(pipe) as seen, no_warnings():
        found = sample(pipe, SD15, 2, **{**arguments, "guidance_scale": scale}, negative="cfg")
    assert seen == [4] * STEPS
    assert torch.equal(found, base)
    assert quiet(pipe)


def test_negative_cfg_without_a_negative_prompt_is_one_pass(wrapped):
    with forwards(wrapped) as seen:
        found = sample(wrapped, SD15, guidance_scale=SCALE, negative="cfg")
    assert seen == [1] * STEPS
    assert torch.equal(found, sample(wrapped, SD15, guidance_scale=SCALE))


def test_negative_cfg_takes_one_scale(wrapped):
    with pytest.raises(ValueError, match=r"negative='cfg' runs the pipeline's own guidance.*found \[2.0, 3.0\]"):
        sample(wrapped, SD15, 2, guidance_scale=[2.0, 3.0], negative_prompt=["blurred"] * 2, negative="cfg")


def test_unknown_negative_is_an_error(wrapped):
    with pytest.raises(ValueError, match="negative must be one of 'warn', 'cfg'; found 'ignore'"):
        sample(wrapped, SD15, negative="ignore")


# the base


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0])
def test_guidance_scale_of_one_is_the_base_without_guidance(pipe, scale):
    base = sample(pipe, SD15, guidance_scale=scale)
    attach(pipe, identity_at_one=False)
    with forwards(pipe) as seen, no_warnings():
        assert torch.equal(sample(pipe, SD15, guidance_scale=scale), base)
    assert seen == [1] * STEPS


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


# double guidance


class Twice(StableDiffusionPipeline):
    """Calls its denoiser a second time in the step."""

    def progress_bar(self, *args, **kwargs):
        self.unet.conv_out.register_forward_hook(self.again)
        return super().progress_bar(*args, **kwargs)

    def again(self, module, args, output):
        vars(module)["_forward_hooks"].clear()
        self.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 16, 16))


def test_a_pipeline_that_calls_its_denoiser_twice_a_step_is_an_error():
    pipe = Twice(**sd15.components())
    pipe.set_progress_bar_config(disable=True)
    base = sample(pipe, SD15, guidance_scale=1.0)
    attach(pipe)
    with pytest.raises(RuntimeError, match=r"twice in one step.*double guidance"):
        sample(pipe, SD15, guidance_scale=SCALE)
    pipe.unet.conv_out._forward_hooks.clear()
    assert quiet(pipe)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, SD15, guidance_scale=1.0), base)


def test_a_pipeline_with_three_branches_is_refused():
    parts = sd15.components(8)
    pipe = StableDiffusionInstructPix2PixPipeline(**parts)
    with pytest.raises(ValueError, match=r"InstructPix2PixPipeline guides by more than two branches \(image_guidance_scale\)"):
        agd.attach(pipe)
    assert type(pipe) is StableDiffusionInstructPix2PixPipeline
    assert attachment_of(pipe) is None


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


def test_hunyuanvideo_15_takes_the_scale_in_the_call_or_from_its_guider():
    family = FAMILIES["hunyuanvideo15"]
    pipe = family.pipeline()
    attach(pipe)
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
        sample(pipe, family, guidance_scale=1.0)
    assert seen == [1] * 4


# Modular Diffusers


def modular(pipe, guider):
    found = StableDiffusionXLAutoBlocks().init_pipeline()
    components = {n: c for n, c in pipe.components.items() if n in found._component_specs and c is not None}
    found.update_components(**components, guider=guider)
    found.set_progress_bar_config(disable=True)
    return found


@torch.no_grad()
def modular_sample(pipe, **arguments):
    call = {"height": 16, "width": 16, "num_inference_steps": 4, "output_type": "latent", "output": "latents"}
    return pipe(**sdxl.inputs(2), **{**call, **arguments}, generator=torch.Generator().manual_seed(3))


def test_a_modular_pipeline_makes_one_forward_a_step_where_cfg_makes_two():
    base = sdxl.pipeline()
    pipe = modular(base, ClassifierFreeGuidance(guidance_scale=SCALE))
    with forwards(base) as seen:
        cfg = modular_sample(pipe)
    assert seen == [2] * 8
    attach(base)
    assert torch.equal(modular_sample(pipe), cfg)  # attached adapters are inert under another guider
    pipe.update_components(guider=AdapterGuidance(SCALE))
    with forwards(base) as seen, no_warnings():
        found = modular_sample(pipe)
    assert seen == [2] * 4
    assert attachment_of(base).omega is None
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
    with agd.guided(base, SCALE):
        assert torch.equal(modular_sample(pipe), found)
    assert not torch.equal(modular_sample(pipe), found)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.3, 0.8), (0.5, 1.0)])
def test_a_modular_pipeline_acts_from_start_to_stop(start, stop):
    base = sdxl.pipeline()
    attach(base)
    pipe, armed, attachment = modular(base, AdapterGuidance(SCALE, start=start, stop=stop)), [], attachment_of(base)
    base.unet.conv_in.register_forward_pre_hook(lambda *_: armed.append(attachment.omega is not None))
    found = modular_sample(pipe, num_inference_steps=5)
    assert armed == [int(start * 5) <= step < int(stop * 5) for step in range(5)]
    expected = sample(base, sdxl.FAMILY, 2, guidance_scale=SCALE, num_inference_steps=5, guidance_interval=(start, stop))
    assert torch.equal(found, expected)


def test_a_modular_pipeline_takes_scales_per_prompt_and_warns_once_of_one_outside():
    base = sdxl.pipeline()
    attach(base)
    pipe = modular(base, AdapterGuidance([2.0, 5.0]))
    with no_warnings():
        found = modular_sample(pipe)
    assert torch.equal(found, sample(base, sdxl.FAMILY, 2, guidance_scale=[2.0, 5.0]))
    for start in (0.0, 0.5):
        pipe.update_components(guider=AdapterGuidance([2.0, 9.0], start=start))
        with pytest.warns(UserWarning, match="lies outside") as seen:
            modular_sample(pipe)
        assert len([warning for warning in seen if warning.category is UserWarning]) == 1


def test_a_guider_arms_unless_it_is_switched_off_and_restores_what_it_found(wrapped):
    guider, attachment = AdapterGuidance(SCALE, enabled=False), attachment_of(wrapped)  # SDXL's blocks would switch it on

    def omega():
        guider.set_state(0, 4, torch.tensor(900))
        guider.prepare_models(wrapped.unet)
        try:
            return None if attachment.omega is None else attachment.omega.tolist()
        finally:
            guider.cleanup_models(wrapped.unet)

    assert omega() is None
    guider.enable()
    assert omega() == [SCALE]
    assert attachment.omega is None
    with agd.guided(wrapped, 2.0):
        assert omega() == [SCALE]
        assert attachment.omega.tolist() == [2.0]
    guider.disable()
    assert omega() is None


def test_a_modular_pipeline_without_an_adapter_is_an_error():
    pipe = modular(sdxl.pipeline(), AdapterGuidance(SCALE))
    with pytest.raises(ValueError, match="no adapter is attached to this UNet2DConditionModel"):
        modular_sample(pipe)


def test_guider_is_saved_as_other_guiders_are(tmp_path):
    AdapterGuidance([2.0, 5.0], start=0.1, stop=0.9).save_pretrained(tmp_path)
    found = AdapterGuidance.from_pretrained(tmp_path)
    assert (found.guidance_scale, found._start, found._stop) == ([2.0, 5.0], 0.1, 0.9)
    assert isinstance(found, nn.Module) is False
    assert found.new(guidance_scale=3.0).guidance_scale == 3.0
