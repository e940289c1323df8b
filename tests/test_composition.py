"""An adapter beside what else is put on a pipeline: IP-Adapter, ControlNet, offloading, copies, low precision."""

import copy
import pickle

import accelerate
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

import agd_fast as agd
from agd_fast.attaching import attachment_of, share
from helpers_pipelines import MODELS, SCALE, attach, forwards, model, sample
from tiny import dit, sd3, sd15, sdxl
from tiny._parts import lively

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]


# IP-Adapter


def test_ip_adapter_by_image_is_one_pass():
    family = sd15.SIBLINGS["ip_adapter"]
    pipe = family.pipeline()
    base = sample(pipe, family, guidance_scale=SCALE)
    attach(pipe)
    with forwards(pipe) as seen:
        found = sample(pipe, family, guidance_scale=SCALE)
        assert not torch.equal(sample(pipe, family, guidance_scale=SCALE, ip_adapter_image=sd15.image(7)), found)
        pipe.set_ip_adapter_scale(0.3)
        assert not torch.equal(sample(pipe, family, guidance_scale=SCALE), found)
        pipe.set_ip_adapter_scale(1.0)
        assert torch.equal(sample(pipe, family, guidance_scale=SCALE), found)
    assert seen == [1] * (4 * STEPS)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, family, guidance_scale=SCALE), base)


def test_ip_adapter_by_embeddings_that_hold_a_negative_half():
    family = sd15.SIBLINGS["ip_adapter"]
    pipe = family.pipeline()
    with torch.no_grad():
        both = pipe.prepare_ip_adapter_image_embeds(sd15.image(), None, "cpu", 1, True)  # [2, 1, D]: negative, positive
        positive = pipe.prepare_ip_adapter_image_embeds(sd15.image(), None, "cpu", 1, False)
    assert torch.equal(both[0][1:], positive[0])
    given = {"ip_adapter_image": None, "ip_adapter_image_embeds": both}
    base, unguided = sample(pipe, family, guidance_scale=SCALE), sample(pipe, family, guidance_scale=1.0)
    assert torch.equal(sample(pipe, family, guidance_scale=SCALE, **given), base)
    attach(pipe)
    found = sample(pipe, family, guidance_scale=SCALE)
    assert torch.equal(sample(pipe, family, guidance_scale=SCALE, **given), found)
    only = {**given, "ip_adapter_image_embeds": positive}
    assert torch.equal(sample(pipe, family, guidance_scale=SCALE, **only), found)
    assert torch.equal(sample(pipe, family, guidance_scale=1.0, **only), unguided)
    with agd.guided(pipe, SCALE):
        assert torch.equal(sample(pipe, family, **given), found)
        assert torch.equal(sample(pipe, family, guidance_scale=1.0, **only), found)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, family, guidance_scale=SCALE, **given), base)


def test_ip_adapter_unloaded_under_an_adapter():
    pipe, plain = sd15.ip_adapter(), SD15.pipeline()
    for one in (pipe, plain):
        attach(one)
    pipe.unload_ip_adapter()
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), sample(plain, SD15, guidance_scale=SCALE))


# further pipelines of the same denoiser


@pytest.mark.parametrize("name", ["img2img", "inpaint", "inpaint_9", "controlnet"])
def test_pipelines_with_further_inputs_make_one_forward_a_step(name):
    family = sd15.SIBLINGS[name]
    pipe = family.pipeline()
    with forwards(pipe) as seen:
        base = sample(pipe, family, 2, guidance_scale=SCALE)
    assert seen == [4] * STEPS
    attach(pipe)
    with forwards(pipe) as seen:
        found = sample(pipe, family, 2, guidance_scale=[SCALE, 2.0])
    assert seen == [2] * STEPS
    assert torch.isfinite(found).all() and not torch.equal(found, base)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, family, 2, guidance_scale=SCALE), base)


def test_controlnet_shares_the_adapter_of_a_plain_pipeline(pipe):
    control = lively(ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)), seed=1)
    attach(pipe)
    other = share(pipe, StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control))
    other.set_progress_bar_config(disable=True)
    family, batches = sd15.SIBLINGS["controlnet"], []
    control.register_forward_pre_hook(lambda _, args, kwargs: batches.append(len(args[0])), with_kwargs=True)
    with forwards(other) as seen:
        found = sample(other, family, guidance_scale=SCALE)
    assert seen == batches == [1] * STEPS
    assert not torch.equal(found, sample(pipe, SD15, guidance_scale=SCALE))
    assert not torch.equal(found, sample(other, family, guidance_scale=SCALE, controlnet_conditioning_scale=0.2))


@pytest.mark.parametrize("strength", [0.5, 0.75])
def test_guidance_interval_of_image_to_image_counts_the_steps_it_makes(strength):
    family = sd15.SIBLINGS["img2img"]
    pipe = family.pipeline()
    attach(pipe)
    attachment, armed = attachment_of(pipe), []
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: armed.append(attachment.omega is not None))
    sample(pipe, family, guidance_scale=SCALE, strength=strength, num_inference_steps=8, guidance_interval=(0.25, 0.75))
    steps = int(8 * strength)
    assert armed == [int(0.25 * steps) <= step < int(0.75 * steps) for step in range(steps)]


def test_adapter_of_the_base_on_a_fine_tuned_checkpoint(pipe, tmp_path):
    tuned = SD15.pipeline()
    with torch.no_grad():
        for parameter in tuned.unet.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    base = sample(tuned, SD15, guidance_scale=SCALE)
    attach(pipe)
    agd.save(pipe, tmp_path)
    agd.load(tuned, tmp_path)
    with forwards(tuned) as seen:
        found = sample(tuned, SD15, guidance_scale=SCALE)
    assert seen == [1] * STEPS
    assert not torch.equal(found, sample(pipe, SD15, guidance_scale=SCALE))
    with agd.disabled(tuned):
        assert torch.equal(sample(tuned, SD15, guidance_scale=SCALE), base)


# offloading; test_traps has that of single denoisers by groups and by hooks of accelerate


@pytest.mark.parametrize("first", ["other", "adapter"])
@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_offloaded_pipelines(pipe, way, first):
    plain = copy.deepcopy(pipe)
    base = sample(plain, SD15, guidance_scale=SCALE)
    attach(plain)

    def offload():
        if way == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        elif way == "sequential":  # of the denoiser: accelerate cannot do it to transformers' text encoders on the CPU
            accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
        else:
            cpu = torch.device("cpu")
            pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=way, num_blocks_per_group=1)

    if first == "other":
        offload()
    adapter = attach(pipe)
    if first == "adapter":
        offload()
    if way == "sequential":
        assert next(pipe.unet.parameters()).device.type == "meta"
    assert next(adapter.parameters()).device.type == "cpu"
    for _ in range(2):
        assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), sample(plain, SD15, guidance_scale=SCALE))
    with agd.guided(pipe, SCALE):
        sample(pipe, SD15)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), base)
    agd.unload(pipe)
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), base)


# copies


def test_a_copy_of_a_wrapped_pipeline_has_an_adapter_of_its_own(pipe):
    base = sample(pipe, SD15, guidance_scale=SCALE)
    attach(pipe)
    expected = sample(pipe, SD15, guidance_scale=SCALE)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert type(other) is type(pipe)
        assert other.unet is not pipe.unet
        with forwards(other) as seen:
            assert torch.equal(sample(other, SD15, guidance_scale=SCALE), expected)
        assert seen == [1] * STEPS
        with torch.no_grad():
            for parameter in attachment_of(other).adapter.parameters():
                parameter.zero_()
        assert not torch.equal(sample(other, SD15, guidance_scale=SCALE), expected)
        agd.unload(other)
        assert type(other) is StableDiffusionPipeline
        assert torch.equal(sample(other, SD15, guidance_scale=SCALE), base)
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), expected)


def test_a_pickled_denoiser_of_a_wrapped_pipeline_takes_its_adapter_along(pipe):
    attach(pipe)
    expected = sample(pipe, SD15, guidance_scale=SCALE)
    other = SD15.pipeline()
    other.register_modules(unet=pickle.loads(pickle.dumps(pipe.unet)))
    with agd.guided(other, SCALE):
        assert torch.equal(sample(other, SD15, guidance_scale=1.0), expected)
    assert torch.equal(sample(share(other, other), SD15, guidance_scale=SCALE), expected)


# low precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", [SD15, sdxl.FAMILY, dit.FAMILY, sd3.FAMILIES[0]], ids=lambda family: family.name)
def test_pipelines_in_low_precision_run_in_one_pass(family, dtype):
    pipe = family.pipeline().to(dtype)
    adapter = attach(pipe)
    with forwards(pipe) as seen:
        found = torch.as_tensor(sample(pipe, family, guidance_scale=SCALE))
    assert seen == [1] * family.call["num_inference_steps"]
    assert torch.isfinite(found).all()
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_low_precision_loses_no_more_with_an_adapter_than_without(name, dtype):
    """Against float64 of the same rounded weights; the plain path is the base's own, whose loss the adapter may double."""
    this = model(name)
    attach(this.denoiser)
    this.denoiser.to(dtype)
    this.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in this.inputs.items()}
    reference = this.exact()
    base, guided = reference(), reference(SCALE)
    lost, found = (this().double() - base).abs().max() / base.abs().max(), this(SCALE)
    assert found.dtype == dtype
    assert (found.double() - guided).abs().max() / guided.abs().max() <= 2 * lost + torch.finfo(dtype).eps
