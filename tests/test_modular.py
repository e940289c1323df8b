"""Modular Diffusers with the adapter as its guider."""

import pytest
import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.guiders import AdapterGuidance
from helpers_pipelines import SCALE, attach, forwards, no_warnings, sample
from tiny import sdxl


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


def test_a_guider_arms_no_adapter_whose_modules_were_replaced():
    base = sdxl.pipeline()
    attach(base)
    pipe = modular(base, AdapterGuidance(SCALE, start=0.5))
    base.unet.conv_norm_out = nn.Identity()
    with pytest.raises(ValueError, match=r"modules of this UNet2DConditionModel were replaced .*'conv_norm_out'"):
        modular_sample(pipe)
    assert attachment_of(base).omega is None


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
