"""Pipelines that take no adapter, and calls of one with an adapter that are refused."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPAGPipeline, StableDiffusionPipeline

import agd_fast as agd
from agd_fast.attaching import attachment_of, share
from helpers_pipelines import SCALE, attach, quiet, sample
from tiny import FAMILIES, sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]


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
    message = r"InstructPix2PixPipeline guides by more than two branches \(image_guidance_scale\)"
    with pytest.raises(ValueError, match=message):
        agd.attach(pipe)
    assert type(pipe) is StableDiffusionInstructPix2PixPipeline
    assert attachment_of(pipe) is None
    agd.attach(pipe.unet)
    with pytest.raises(ValueError, match=message):  # its call would arm that
        agd.optimize(pipe)
    assert type(pipe) is StableDiffusionInstructPix2PixPipeline
    assert type(agd.optimize(agd.unload(pipe))) is not StableDiffusionInstructPix2PixPipeline


def test_perturbed_attention_is_a_branch_that_no_adapter_knows(wrapped):
    other = StableDiffusionPAGPipeline.from_pipe(wrapped, pag_applied_layers=["mid"])
    with pytest.raises(ValueError, match=r"StableDiffusionPAGPipeline guides by more than two branches \(pag_scale\)"):
        share(wrapped, other)
    assert type(other) is StableDiffusionPAGPipeline


# one call at a time


@pytest.mark.parametrize(
    "first", [{"guidance_scale": SCALE}, {"guidance_scale": 1.0}, {"negative_prompt": ["x"], "negative": "cfg"}]
)
@pytest.mark.parametrize("second", [{"guidance_scale": SCALE}, {"guidance_scale": 1.0}, {}])
def test_a_call_inside_another_is_an_error_and_leaves_that_as_it_is(wrapped, first, second):
    """As from two threads at once."""
    partner = share(wrapped, StableDiffusionPipeline.from_pipe(wrapped))
    expected = sample(wrapped, SD15, **first)
    seen = []

    def callback(pipe, step, t, tensors):
        for other in (pipe, partner):
            with pytest.raises(RuntimeError, match="another call of this StableDiffusionPipeline, or of one that shares its"):
                sample(other, SD15, **second)
        seen.append(step)
        return tensors

    assert torch.equal(sample(wrapped, SD15, **first, callback_on_step_end=callback), expected)
    assert seen == [*range(STEPS)]
    assert torch.equal(sample(partner, SD15, **first), expected)


def test_a_copy_that_is_made_during_a_call_is_in_none(wrapped):
    copies = []

    def callback(pipe, step, t, tensors):
        assert attachment_of(pipe).caller is not None
        copies.append(copy.deepcopy(attachment_of(pipe)))
        return tensors

    sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=callback)
    assert all(one.caller is None for one in copies)


@pytest.mark.parametrize("how", ["a callback", "a thread"])
def test_a_call_by_the_base_inside_another_is_an_error_too(wrapped, how):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    partner = share(wrapped, StableDiffusionPipeline.from_pipe(wrapped))
    with agd.disabled(wrapped):
        base = sample(wrapped, SD15, guidance_scale=SCALE)

    def inside():
        with agd.disabled(partner):
            sample(partner, SD15, guidance_scale=SCALE)

    def callback(pipe, step, t, tensors):
        message = "also inside agd_fast.disabled" if how == "a callback" else "which it would change"
        with pytest.raises(RuntimeError, match=message):
            inside() if how == "a callback" else in_thread(inside)
        return tensors

    assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=callback), expected)
    assert quiet(wrapped)
    if how == "a callback":
        with agd.disabled(wrapped):
            assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=callback), base)


def test_guided_in_another_thread_is_an_error_during_a_call(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)

    def inside():
        with agd.guided(wrapped.unet, 2.0):
            pass

    def callback(pipe, step, t, tensors):
        with pytest.raises(RuntimeError, match=r"agd_fast.guided\(...\) in one thread, and a call .* in another, which it would"):
            in_thread(inside)
        inside()  # and leaves the scale of the call as it was
        return tensors

    assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=callback), expected)
    in_thread(inside)


def in_thread(action):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(action).result()


@pytest.mark.parametrize("name", ["flux2", "krea2"])
def test_a_pipeline_whose_model_is_distilled_is_refused_and_can_be_optimized(name):
    pipe = FAMILIES[name].pipeline()
    pipe.register_to_config(is_distilled=True)
    with pytest.raises(ValueError, match=r"Pipeline says that its model is distilled \(is_distilled=True\), so it makes one"):
        attach(pipe)
    assert attachment_of(pipe) is None
    assert agd.info(agd.optimize(pipe))["engine"] is not None
