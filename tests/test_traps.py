"""Every trap of attaching to diffusers' denoisers.

Shown elsewhere:
- disabled and unloaded are the base bit for bit, copies and pickles: test_attaching, test_guided
- torch.compile of a whole denoiser, attaching after its first call, block by block, adapters on one block: test_compile
- DiT drops labels in train mode, so collecting, training and evaluating keep the base in eval: test_distillation, test_teacher
- LoRA: test_lora; offloading and whole pipelines: test_composition; FSDP2: test_parallel
"""

import contextlib
import copy
import functools
import json
import types

import accelerate
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import agd_fast as agd
from agd_fast.attaching import attachment_of, share
from helpers_pipelines import MODELS, SCALE, attach, forwards, model, sample
from tiny import FAMILIES, dit, sd15

every_model = pytest.mark.parametrize("name", MODELS)
order = pytest.mark.parametrize("first", ["hook", "adapter"])


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# modules that others take the place of


@pytest.mark.parametrize("name", MODELS)
def test_modules_that_are_replaced_under_an_adapter_are_named(name):
    this = model(name)
    attach(this.denoiser)
    path = next(this.attachment.adapter.sites).site.path
    this.denoiser.set_submodule(path, nn.Identity())
    message = rf"of this {type(this.denoiser).__name__} were replaced .*\(1, first '{path}'\).*; expected agd_fast.unload"
    with pytest.raises(ValueError, match=message):
        this(SCALE)


def test_free_noise_under_an_adapter_is_an_error():
    pipe = FAMILIES["animatediff"].pipeline()
    pipe.motion_adapter = types.SimpleNamespace(config=types.SimpleNamespace(motion_max_seq_length=32))
    attach(pipe)
    given = {**FAMILIES["animatediff"].call, "prompt": "a red cat", "guidance_scale": SCALE}
    pipe(**given)
    pipe.enable_free_noise(context_length=2, context_stride=1)
    with pytest.raises(ValueError, match=r"UNetMotionModel were replaced .*motion_modules"):
        pipe(**given)
    attach(agd.unload(pipe))
    with forwards(pipe) as seen:
        pipe(**given)
    assert len(seen) == given["num_inference_steps"]


# torch.compile block by block


@torch.no_grad()
def test_blocks_that_compiled_ones_replace_keep_their_names(tmp_path):
    this, config = model("dit"), {"kind": "modulation+cross_attention"}
    blocks = this.denoiser.transformer_blocks
    lora = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    plain = this.copy()
    for one in (plain, this):
        torch.manual_seed(0)
        inject_adapter_in_model(lora, one.denoiser)
    attach(plain.denoiser, **config)
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    compiled = [*blocks]
    attach(this.denoiser, **config)
    assert torch.equal(this(SCALE), plain(SCALE))
    agd.save(this.denoiser, tmp_path)
    agd.unload(plain.denoiser)
    agd.load(plain.denoiser, tmp_path)
    assert torch.equal(this(SCALE), plain(SCALE))
    assert all(now is before for now, before in zip(blocks, compiled, strict=True))


@torch.no_grad()
def test_adapter_on_the_layers_of_one_block_with_blocks_compiled_one_by_one():
    this, layers = model("sd3"), ("transformer_blocks.1.norm1.linear",)
    base = this()
    for block in this.denoiser.transformer_blocks:
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(this(), base)
    attach(this.denoiser, layers=layers)
    assert tuple(part.site.path for part in this.attachment.adapter.sites) == layers
    found = this(SCALE)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(found, this(SCALE))
    assert not torch.equal(found, base)
    assert torch.equal(this(), base)
    agd.unload(this.denoiser)
    assert torch.equal(this(), base)


@torch.no_grad()
def test_no_form_of_omega_or_timestep_recompiles_a_block():
    this, counter = model("unet"), CompileCounter()
    attach(this.denoiser)
    expected = this(SCALE, timestep=7)
    this.denoiser.compile_repeated_blocks(backend=counter, fullgraph=True)
    this(SCALE)
    frames = counter.frame_count
    for scale in (SCALE, [SCALE], [SCALE, SCALE], torch.tensor(SCALE), torch.full((2,), SCALE, dtype=torch.float64)):
        for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), torch.tensor(7.0)):
            assert torch.equal(this(scale, timestep=t), expected)
    assert counter.frame_count == frames


def test_omega_and_timestep_reach_the_adapter_as_one_a_sample(monkeypatch):
    this, seen = model("unet"), []
    adapter = attach(this.denoiser)
    prepare = adapter.prepare
    monkeypatch.setattr(adapter, "prepare", lambda *args, **kwargs: seen.append(args[:2]) or prepare(*args, **kwargs))
    for scale, t in ((SCALE, 7), ([SCALE], torch.tensor(7)), ([SCALE, 2.0], torch.tensor([7, 8]))):
        this(scale, timestep=t)
    for omega, time in seen:
        assert (omega.shape, omega.dtype) == ((2,), torch.float32)
        assert time.shape[0] == 2


# hooks of others


@every_model
@order
@torch.no_grad()
def test_hooks_of_accelerate_leave_the_adapter_as_it_is(name, first):
    this = model(name)
    base = this()
    plain = this.copy()
    attach(plain.denoiser)
    expected = plain(SCALE)

    def put():
        for module in (this.denoiser, *map(this.denoiser.get_submodule, paths)):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    paths = {part.site.path for part in plain.attachment.adapter.sites}
    if first == "hook":
        put()
    attach(this.denoiser)
    if first == "adapter":
        put()
    assert torch.equal(this(SCALE), expected)
    assert torch.equal(this(), base)
    agd.unload(this.denoiser)
    assert torch.equal(this(), base)
    assert all(hasattr(this.denoiser.get_submodule(path), "_hf_hook") for path in paths)
    remove_hook_from_module(this.denoiser, recurse=True)
    assert torch.equal(this(), base)


class Counting(ModelHook):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@every_model
@order
@torch.no_grad()
def test_hooks_of_a_registry_leave_the_adapter_as_it_is(name, first):
    this = model(name)
    base = this()
    plain = this.copy()
    attach(plain.denoiser)
    expected, hooks = plain(SCALE), []

    def put():
        for module in (this.denoiser, *map(this.denoiser.get_submodule, paths)):
            hooks.append(Counting())
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hooks[-1], "counting")

    paths = {part.site.path for part in plain.attachment.adapter.sites}
    if first == "hook":
        put()
    attach(this.denoiser)
    if first == "adapter":
        put()
    assert torch.equal(this(SCALE), expected)
    assert all(hook.calls for hook in hooks)
    assert torch.equal(this(), base)
    agd.unload(this.denoiser)
    assert torch.equal(this(), base)
    HookRegistry.check_if_exists_or_initialize(this.denoiser).remove_hook("counting", recurse=True)
    assert torch.equal(this(), base)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("name", ["unet", "sd3"])
@order
@torch.no_grad()
def test_group_offloading_before_or_after_attach(name, kind, first):
    this = model(name)
    base = this()
    plain = this.copy()
    attach(plain.denoiser)
    cpu = torch.device("cpu")
    groups = {"onload_device": cpu, "offload_device": cpu, "offload_type": kind, "num_blocks_per_group": 1}
    if first == "hook":
        this.denoiser.enable_group_offload(**groups)
    attach(this.denoiser)
    if first == "adapter":
        this.denoiser.enable_group_offload(**groups)
    assert torch.equal(this(SCALE), plain(SCALE))
    assert torch.equal(this(), base)
    agd.unload(this.denoiser)
    assert torch.equal(this(), base)


@every_model
@order
@torch.no_grad()
def test_embedders_of_a_base_that_is_still_offloaded_are_moved_to_the_input(name, first, monkeypatch):
    """On "meta", a device apart on which nothing is computed: accelerate brings the base in its forward, after our hook."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())  # unknown to "meta"
    this = model(name)
    if first == "hook":
        accelerate.cpu_offload_with_hook(this.denoiser, "meta")
    adapter = attach(this.denoiser)
    if first == "adapter":
        accelerate.cpu_offload_with_hook(this.denoiser, "meta")
    assert next(this.denoiser.parameters()).device.type == "cpu"
    found = this(SCALE, **{key: value.to("meta") for key, value in this.inputs.items()})
    assert found.device.type == next(adapter.parameters()).device.type == "meta"


# gradient checkpointing


def gradients(this, scale=SCALE, between=lambda: None):
    adapter = this.attachment.adapter
    adapter.zero_grad()
    output = this(scale)
    between()
    output.square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in adapter.named_parameters()}


@every_model
@pytest.mark.parametrize("between", ["nothing", "teacher", "another scale"])
def test_gradient_checkpointing_gives_the_same_gradients(name, between):
    this = model(name)
    this.denoiser.requires_grad_(False).train()
    if name == "dit":
        this.denoiser.eval()  # it drops labels in train mode
    base = this()
    attach(this.denoiser)
    expected = gradients(this)
    assert all(value.any() for value in expected.values())
    this.denoiser.enable_gradient_checkpointing()
    functions = [module._gradient_checkpointing_func for module in checkpointing(this.denoiser)]
    assert functions

    def teacher():
        with torch.no_grad(), agd.disabled(this.denoiser):
            this()

    def other():
        with torch.no_grad():
            this(2.0)

    doing = {"nothing": lambda: None, "teacher": teacher, "another scale": other}
    found = gradients(this, between=doing[between])
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert torch.equal(this(), base)  # what was armed again for the recomputation is not any more
    assert [module._gradient_checkpointing_func for module in checkpointing(this.denoiser)] == functions


def checkpointing(denoiser):
    return [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]


@every_model
def test_two_armed_forwards_before_one_backward_keep_their_own_scales(name):
    this = model(name)
    this.denoiser.requires_grad_(False)
    adapter = attach(this.denoiser)

    def both():
        adapter.zero_grad()
        (this(2.0).square().mean() + this([5.0, 1.5]).square().mean()).backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    expected = both()
    this.denoiser.enable_gradient_checkpointing()
    if name != "dit":
        this.denoiser.train()
    for found, value in zip(both(), expected, strict=True):
        assert torch.equal(found, value)


@every_model
def test_reentrant_checkpointing_is_refused(name):
    this = model(name)
    this.denoiser.requires_grad_(False).train()
    attach(this.denoiser)

    def checkpoint(*args, use_reentrant):
        return torch.utils.checkpoint.checkpoint(*args, use_reentrant=use_reentrant)

    this.denoiser.enable_gradient_checkpointing(functools.partial(checkpoint, use_reentrant=True))
    with pytest.raises(ValueError, match=r"use_reentrant=False.*found use_reentrant=True"):
        this(SCALE)
    this()
    with torch.no_grad():
        this(SCALE)


# what is saved, and what LoRA sees


@pytest.mark.parametrize("family", [sd15.FAMILY, dit.FAMILY], ids=lambda family: family.name)
def test_saving_a_wrapped_pipeline_writes_the_base_alone(family, tmp_path):
    pipe = family.pipeline()
    cls, states = type(pipe), {name: sorted(m.state_dict()) for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    base = sample(pipe, family, **family.guided)
    attach(pipe)
    assert type(pipe) is not cls
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == cls.__name__
    for name, keys in states.items():
        assert index[name][1] == type(getattr(pipe, name)).__name__
        assert sorted(load_file(next((tmp_path / name).glob("*.safetensors")))) == keys
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is cls
    assert attachment_of(loaded) is None
    assert torch.equal(torch.as_tensor(sample(loaded, family, **family.guided)), torch.as_tensor(base))


SUFFIXES = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_in", "proj_out", "linear", "linear_1", "conv1", "ff.net.2"]


@pytest.mark.parametrize("kind", ["modulation", "gated_lora", "cross_attention", "offset"])
@every_model
def test_suffixes_that_lora_targets_hit_no_linear_of_the_adapter(name, kind):
    this = model(name)
    adapter = attach(this.denoiser, kind=kind)
    both = nn.ModuleDict({"denoiser": this.denoiser, "adapter": adapter})
    classes = [type(module) for module in adapter.modules()]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=SUFFIXES), both)
    assert any(hasattr(module, "base_layer") for module in this.denoiser.modules())
    assert [type(module) for module in adapter.modules()] == classes


# pipelines that share a denoiser


def test_from_pipe_shares_the_denoiser_but_not_the_wrapper():
    pipe, family = sd15.pipeline(), sd15.SIBLINGS["img2img"]
    alone = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    alone.set_progress_bar_config(disable=True)
    cfg = sample(alone, family, guidance_scale=SCALE)
    attach(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert other.unet is pipe.unet
    with forwards(other) as seen:
        assert torch.equal(sample(other, family, guidance_scale=SCALE), cfg)  # its own two passes, unarmed
    assert seen == [2] * 4
    assert share(pipe, other) is other
    with forwards(other) as seen:
        found = sample(other, family, guidance_scale=SCALE)
    assert seen == [1] * 4
    assert not torch.equal(found, cfg)
    with agd.guided(other, SCALE):
        assert torch.equal(sample(other, family, guidance_scale=1.0), found)


def test_share_wants_an_adapter_and_the_same_denoiser():
    pipe, other = sd15.pipeline(), sd15.img2img()
    with pytest.raises(ValueError, match=r"expected a StableDiffusionPipeline with an adapter to share, found none"):
        share(pipe, other)
    attach(pipe)
    with pytest.raises(ValueError, match=r"another UNet2DConditionModel. Make one by StableDiffusionImg2ImgPipeline.from_pipe"):
        share(pipe, copy.deepcopy(other))
    assert type(other) is StableDiffusionImg2ImgPipeline
