"""torch.compile of a pipeline's denoiser that carries an adapter."""

import copy

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from torch._dynamo.testing import CompileCounter

import agd_fast as agd
from agd_fast.attaching import share
from conftest import assert_as_exact
from helpers_pipelines import SCALE, attach, exact, forwards, noise, sample
from tiny import sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compile_it(pipe, way, backend):
    if way == "whole":
        pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    elif way == "in place":
        pipe.unet.compile(backend=backend, fullgraph=True)
    else:
        pipe.unet.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.mark.parametrize(
    ("way", "first"), [("whole", "other"), ("in place", "adapter"), ("blocks", "other"), ("blocks", "adapter")]
)
def test_compiled_pipelines_are_guided_in_one_pass(pipe, way, first):
    eager, counter, off = copy.deepcopy(pipe), CompileCounter(), {"guidance_scale": 1.0}
    base = sample(pipe, SD15, **off)
    attach(eager)
    if first == "other":
        compile_it(pipe, way, counter)
        assert torch.equal(sample(pipe, SD15, **off), base)
    attach(pipe)
    if first == "adapter":
        compile_it(pipe, way, counter)
    with forwards(pipe) as seen:
        found = sample(pipe, SD15, guidance_scale=SCALE)
    assert seen == [1] * STEPS
    assert torch.equal(found, sample(eager, SD15, guidance_scale=SCALE))  # the counter's backend is eager
    interval = {"guidance_scale": SCALE, "guidance_interval": (0.25, 0.75)}
    assert torch.equal(sample(pipe, SD15, **interval), sample(eager, SD15, **interval))
    frames = counter.frame_count
    for scale in (2.0, 3.5, [5.0]):
        sample(pipe, SD15, guidance_scale=scale)
        sample(pipe, SD15, **{**interval, "guidance_scale": scale})
    assert counter.frame_count == frames
    with pytest.raises(RuntimeError, match="double guidance"), agd.guided(pipe, SCALE):
        pipe(**{**SD15.inputs(1), **SD15.call, "callback_on_step_end": again})
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, SD15, **off), base)
    agd.unload(pipe)
    assert torch.equal(sample(pipe, SD15, **off), base)


@torch.no_grad()
def again(pipe, step, t, tensors):
    """A call as the pipeline makes them; the pipeline's own, of the same step, follows."""
    others = dict.fromkeys(("timestep_cond", "cross_attention_kwargs", "added_cond_kwargs"))
    pipe.unet(tensors["latents"], t, encoder_hidden_states=torch.zeros(1, 16, 16), **others, return_dict=False)
    return tensors


def test_a_pipeline_compiled_by_inductor_is_as_exact_as_eager(pipe):
    attach(pipe)
    latents = noise(1)
    reference = sample(exact(pipe), SD15, guidance_scale=SCALE, latents=latents.double())
    plain = sample(pipe, SD15, guidance_scale=SCALE, latents=latents)
    pipe.unet.compile_repeated_blocks(fullgraph=True)
    with forwards(pipe) as seen:
        found = sample(pipe, SD15, guidance_scale=SCALE, latents=latents)
    assert seen == [1] * STEPS
    assert_as_exact(found, plain, reference)


def test_a_compiled_pipeline_shares_its_denoiser(pipe):
    pipe.unet.compile(backend="eager")
    attach(pipe)
    other = share(pipe, StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    other.set_progress_bar_config(disable=True)
    family = sd15.SIBLINGS["img2img"]
    with forwards(other) as seen:
        found = sample(other, family, guidance_scale=SCALE)
    assert seen == [1] * STEPS
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(sample(other, family, guidance_scale=SCALE), found)
