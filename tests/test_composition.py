"""An adapter beside what else is put on a denoiser or a pipeline: LoRA, IP-Adapter, ControlNet, offloading, low precision,
torch.compile, DDP and FSDP2."""

import copy
import os
import pickle
import socket

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import distributed, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import agd_fast as agd
from agd_fast.attaching import attachment_of, require_attachment, share
from conftest import assert_as_exact
from helpers_distillation import in_children
from helpers_pipelines import MODELS, SCALE, attach, exact, forwards, model, noise, sample
from tiny import dit, sd3, sd15, sdxl
from tiny._parts import lively

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]
order = pytest.mark.parametrize("first", ["other", "adapter"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipe():
    return SD15.pipeline()


# LoRA by peft

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj", "ff.net.2"],
    "dit": ["to_q", "to_v", "linear", "proj_out_1", "proj_out_2"],
    "sd3": ["to_q", "to_k", "add_v_proj", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out"],
}
KINDS = {"unet": ["modulation+gated_lora", "cross_attention"], "dit": ["modulation"], "sd3": ["modulation", "gated_lora"]}
lora_cases = pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in KINDS.items() for kind in kinds])


def add_lora(denoiser, name, adapter_name="default"):
    torch.manual_seed(2)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS[name], init_lora_weights=False)
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config, adapter_name)
    else:
        inject_adapter_in_model(config, denoiser, adapter_name)


def remove_lora(denoiser):
    getattr(denoiser, "unload_lora", lambda: recurse_remove_peft_layers(denoiser))()


@lora_cases
@torch.no_grad()
def test_lora_before_or_after_attach_is_the_same(name, kind):
    this, lora = model(name), model(name)
    base = this()
    add_lora(lora.denoiser, name)
    with_lora = lora()
    assert not torch.equal(with_lora, base)
    attach(this.denoiser, kind=kind)
    without_lora = this(SCALE)
    add_lora(this.denoiser, name)
    found = this(SCALE)
    for other in (with_lora, without_lora, base):
        assert not torch.equal(found, other)
    assert torch.equal(this(), with_lora)
    with agd.guided(this.denoiser, SCALE), agd.disabled(this.denoiser):
        assert torch.equal(this(), with_lora)
    attach(lora.denoiser, kind=kind)
    assert torch.equal(lora(SCALE), found)
    for one in (this, lora):
        agd.unload(one.denoiser)
        assert torch.equal(one(), with_lora)
        assert not any("_agd_base" in vars(type(module)) for module in one.denoiser.modules())


@lora_cases
@order
@torch.no_grad()
def test_lora_may_come_and_go_around_an_adapter(name, kind, first):
    """Its wrappers leave with it: an adapter that lay on them would silently do nothing from then on."""
    plain = model(name)
    attach(plain.denoiser, kind=kind)
    this = model(name)
    base = this()
    if first == "other":
        add_lora(this.denoiser, name)
    attach(this.denoiser, kind=kind)
    if first == "adapter":
        add_lora(this.denoiser, name)
    remove_lora(this.denoiser)
    assert torch.equal(this(), base)
    assert torch.equal(this(SCALE), plain(SCALE))
    add_lora(this.denoiser, name)
    agd.unload(this.denoiser)
    remove_lora(this.denoiser)
    assert torch.equal(this(), base)
    attach(this.denoiser, kind=kind)
    assert torch.equal(this(SCALE), plain(SCALE))


@order
def test_lora_of_a_pipeline_loaded_scaled_and_unloaded(first, tmp_path):
    donor = SD15.pipeline()
    add_lora(donor.unet, "unet", "style")
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(donor.unet, adapter_name="style")
    )
    with_lora = sample(donor, SD15, guidance_scale=SCALE)
    pipe, plain = SD15.pipeline(), SD15.pipeline()
    attach(plain)
    without_lora = sample(plain, SD15, guidance_scale=SCALE)
    if first == "other":
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    attach(pipe)
    if first == "adapter":
        pipe.load_lora_weights(tmp_path, adapter_name="style")
    with forwards(pipe) as seen:
        found = sample(pipe, SD15, guidance_scale=SCALE)
    assert seen == [1] * STEPS
    assert not torch.equal(found, without_lora)
    with agd.disabled(pipe):
        assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), with_lora)
    pipe.set_adapters(["style"], [0.5])
    assert not torch.equal(sample(pipe, SD15, guidance_scale=SCALE), found)
    pipe.set_adapters(["style"], [1.0])
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), found)
    pipe.disable_lora()
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), without_lora)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(sample(pipe, SD15, guidance_scale=SCALE), without_lora)


@torch.no_grad()
def test_fused_lora_under_an_adapter_is_as_exact_as_unfused():
    """With the adapter where LoRA is not, as a fused module's output already holds LoRA's part."""
    this = model("unet")
    attach(this.denoiser, kind="cross_attention")
    add_lora(this.denoiser, "unet")
    unfused, reference, base = this(SCALE), this.exact()(SCALE), this()
    this.denoiser.fuse_lora()
    assert_as_exact(this(SCALE), unfused, reference)
    this.denoiser.unfuse_lora()
    assert_as_exact(this(SCALE), unfused, reference)
    assert not torch.equal(this(SCALE), base)


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


@order
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


# torch.compile of a pipeline's denoiser


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


# DDP and FSDP2, in two processes


class Guided(nn.Module):
    """A denoiser with its adapter as one module, as `distill` trains them: what wraps it wraps both."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.adapter = denoiser, require_attachment(denoiser).adapter

    def forward(self, omega, **inputs):
        with agd.guided(self.denoiser, omega):
            return self.denoiser(**inputs, return_dict=False)[0].square().mean()


def gradients(this, rank=None, wrap=lambda denoiser: denoiser, first="adapter", ddp=False):
    """Of the adapter, and, of a rank alone, those of its sample in two."""
    scales, rows = torch.tensor([2.0, 5.0]), slice(None) if rank is None else slice(rank, rank + 1)
    if this.attachment is None and first == "other":
        wrap(this.denoiser, embedder=False)
    if this.attachment is None:
        attach(this.denoiser)
    if first == "adapter":
        wrap(this.denoiser)
    this.denoiser.requires_grad_(False)
    module = Guided(this.denoiser)
    if ddp:
        module = DistributedDataParallel(module)
    module(scales[rows], **{name: value[rows] for name, value in this.inputs.items()}).backward()
    adapter = this.attachment.adapter
    if rank is not None and not ddp:
        for parameter in adapter.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    return {name: parameter.grad.numpy() for name, parameter in adapter.named_parameters()}


def shard(denoiser, embedder=True):
    """Each block, and what is left, as one of FSDP2's groups; DiT itself reaches into its first block.

    embedder: of t, as a group of its own: one of those does not run before the denoiser itself has.
    """
    blocks = [*getattr(denoiser, "down_blocks", []), *getattr(denoiser, "up_blocks", [])]
    for block in blocks or [*denoiser.transformer_blocks][1:]:
        fully_shard(block)
    if embedder and hasattr(denoiser, "time_embedding"):
        fully_shard(denoiser.time_embedding)
    fully_shard(denoiser)


def one_of_two(rank, port, name, way, first):
    names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        this = model(name)
        if way == "ddp":
            return gradients(this, rank, ddp=True), type(this.denoiser).__name__
        found = gradients(this, rank, shard, first), type(this.denoiser).__name__
        agd.unload(this.denoiser)
        assert all("_agd" not in vars(module) for module in this.denoiser.modules())
        attach(this.denoiser)  # and again
        with torch.no_grad():
            this(SCALE)
        return found
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "way", "first"),
    [("unet", "ddp", "adapter"), ("unet", "fsdp2", "adapter"), ("unet", "fsdp2", "other"), ("dit", "fsdp2", "other")],
)
def test_gradients_of_two_processes_are_those_of_one(name, way, first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (found, cls), (other, _) = in_children(one_of_two, 2, port, name, way, first)
    assert ("FSDP" in cls) == (way == "fsdp2")
    this = model(name)
    attach(this.denoiser)
    reference = gradients(this.exact())
    for key, plain in gradients(this).items():
        assert (found[key] == other[key]).all()
        assert_as_exact(torch.from_numpy(found[key]), torch.from_numpy(plain), torch.from_numpy(reference[key]))
