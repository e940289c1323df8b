"""LoRA by peft and an adapter on the same denoiser, in either order."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

import agd_fast as agd
from conftest import assert_as_exact
from helpers_pipelines import SCALE, attach, forwards, model, sample
from tiny import sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]
order = pytest.mark.parametrize("first", ["other", "adapter"])

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
