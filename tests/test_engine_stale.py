"""An optimized model gives what the same model without the engine gives, whatever was changed, and whenever."""

from itertools import pairwise

import pytest
import torch
from diffusers import ControlNetModel, EulerDiscreteScheduler, StableDiffusionControlNetPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of, require_attachment, scoped
from agd_fast.engine import engine_of
from agd_fast.graph.levels import Level
from helpers_engine import (
    RECORDED,
    SCALE,
    Holder,
    add_lora,
    assert_same,
    call,
    differs,
    own_forwards,
    programs,
    small_unet,
    twins,
    unet_inputs,
)
from helpers_pipelines import attach, noise, sample
from tiny import sd15
from tiny._parts import lively
from tiny.text import prompts


class Doubled(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def to_k(pipe):
    return next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2")).to_k


@torch.no_grad()
def write_base(pipe):
    to_k(pipe).weight.mul_(-2)


@torch.no_grad()
def write_adapter(pipe):
    for parameter in attachment_of(pipe).adapter.parameters():
        parameter.mul_(0.5)


def write_hoisted_data(pipe):
    to_k(pipe).weight.data.mul_(-2)


def write_data(pipe):
    pipe.unet.conv_in.weight.data.mul_(0.5)


def write_adapter_data(pipe):
    for parameter in attachment_of(pipe).adapter.parameters():
        parameter.data.mul_(0.5)


def give_data(pipe):
    to_k(pipe).weight.data = -2 * to_k(pipe).weight.data


def set_processor(pipe):
    pipe.unet.set_attn_processor(Doubled())


def enable_freeu(pipe):
    pipe.unet.enable_freeu(s1=0.5, s2=0.5, b1=1.5, b2=1.5)


def replace_module(pipe):
    pipe.unet.conv_out = lively(nn.Conv2d(8, 4, 3, padding=1, bias=False), seed=5)


def load_others(assign):
    def change(pipe):
        pipe.unet.load_state_dict(lively(small_unet(), seed=9).state_dict(), assign=assign)

    return change


def set_scheduler(pipe):
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def replace_adapter(pipe):
    agd.unload(pipe)
    attach(pipe, hidden=4)


CHANGES = {
    "base": write_base,
    "adapter": write_adapter,
    "processor": set_processor,
    "freeu": enable_freeu,
    "module": replace_module,
    "state dict": load_others(False),
    "assigned state dict": load_others(True),
    "lora": add_lora,
    "another adapter": replace_adapter,
}
BETWEEN = {
    "data of the base": write_data,
    "hoisted data of the base": write_hoisted_data,
    "data of the adapter": write_adapter_data,
    "other data of the base": give_data,
    "scheduler": set_scheduler,
    "dtype": lambda pipe: pipe.to(torch.float64),
    "memory format": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "fused projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "unloaded": agd.unload,
}
EQUAL = ("fused projections", "memory format")  # the same function in another form


def assert_follows(pair, change=lambda pipe: None, equal=False, **arguments):
    """Before the change and after it."""
    plain, fast = pair
    before = call(plain)
    assert_same(call(fast), before)
    for pipe in pair:
        change(pipe)
    after = call(plain, **arguments)
    assert equal or differs(after, before)
    for _ in range(2):
        assert_same(call(fast, **arguments), after)


@pytest.mark.parametrize("name", [*CHANGES, *BETWEEN])
def test_a_model_that_was_changed_between_calls(name):
    assert_follows(twins(), {**CHANGES, **BETWEEN}[name], equal=name in EQUAL)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": "green ship"},
        {"num_inference_steps": 7},
        {"guidance_scale": 2.0},
        {"guidance_scale": 1.0},
        {"prompt": prompts(2), "guidance_scale": [2.0, 5.0]},
        {"num_images_per_prompt": 2},
        {"height": 24},
        {"timesteps": None, "guidance_interval": (0.0, 0.5)},
        {"guidance_scale": lambda fraction: 2 + 4 * fraction},
    ],
    ids=lambda arguments: "+".join(arguments),
)
def test_calls_with_other_arguments(arguments):
    assert_follows(twins(), **arguments)


def during(change):
    """A callback that changes the pipeline after the second of four steps."""

    def callback(pipe, step, t, tensors):
        if step == 1:
            change(pipe)
        return tensors

    return callback


def assert_follows_within(pair, callback, **arguments):
    plain, fast = pair
    before = call(plain)
    assert_same(call(fast), before)
    after = call(plain, callback_on_step_end=callback, **arguments)
    assert differs(after, before)
    assert_same(call(fast, callback_on_step_end=callback, **arguments), after)


@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_is_changed_in_the_middle_of_a_call(name):
    assert_follows_within(twins(), during(CHANGES[name]))


def written(pipe, step, t, tensors):
    if step == 1:
        tensors["prompt_embeds"].mul_(-1)
    return tensors


def replaced(pipe, step, t, tensors):
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * -1} if step == 1 else tensors


def always_replaced(pipe, step, t, tensors):
    return {**tensors, "prompt_embeds": tensors["prompt_embeds"] * 0.9}


@pytest.mark.parametrize("callback", [written, replaced, always_replaced])
@pytest.mark.parametrize("kind", ["modulation+gated_lora", "cross_attention"])
def test_prompts_that_a_callback_changes(kind, callback):
    tensors = ["latents", "prompt_embeds"]
    pair = twins(kind=kind)
    assert_follows_within(pair, callback, callback_on_step_end_tensor_inputs=tensors)
    assert_same(call(pair[1]), call(pair[0]))


# LoRA


def scale_lora(pipe):
    pipe.set_adapters(["style"], [0.3])


def fuse_lora(pipe):
    pipe.unet.fuse_lora(lora_scale=0.5)


def switch_lora_off(pipe):
    pipe.disable_lora()


def unload_lora(pipe):
    pipe.unload_lora_weights()


LORA = [scale_lora, fuse_lora, switch_lora_off, unload_lora]


@pytest.fixture
def with_lora():
    pair = twins()
    for pipe in pair:
        add_lora(pipe)
    return pair


@pytest.mark.parametrize("change", LORA)
def test_lora_that_changes_between_calls(with_lora, change):
    assert_follows(with_lora, change)


@pytest.mark.parametrize("change", LORA)
def test_lora_that_changes_in_the_middle_of_a_call(with_lora, change):
    assert_follows_within(with_lora, during(change))


def test_lora_that_is_fused_and_unfused(with_lora):
    plain, fast = with_lora
    for change in (fuse_lora, lambda pipe: pipe.unet.unfuse_lora(), scale_lora):
        for pipe in with_lora:
            change(pipe)
        assert_same(call(fast), call(plain))


def test_lora_with_a_scale_in_the_call(with_lora):
    plain, fast = with_lora
    found = []
    for scale in (1.0, 0.3, 1.0, 0.3):
        found.append(call(plain, cross_attention_kwargs={"scale": scale}))
        assert_same(call(fast, cross_attention_kwargs={"scale": scale}), found[-1])
    assert differs(found[0], found[1])


# IP-Adapter and ControlNet


def test_ip_adapter_with_other_images_and_scales():
    family = sd15.SIBLINGS["ip_adapter"]
    plain, fast = twins(family.pipeline, kind="modulation")
    found = []
    for scale, image in ((1.0, 0), (0.3, 0), (0.3, 7), (1.0, 0)):
        for pipe in (plain, fast):
            pipe.set_ip_adapter_scale(scale)
        arguments = {"guidance_scale": SCALE, "ip_adapter_image": sd15.image(image)}
        found.append(sample(plain, family, **arguments))
        assert_same(sample(fast, family, **arguments), found[-1])
    assert differs(found[0], found[1]) and differs(found[1], found[2])


def set_image_scale(pipe):
    pipe.set_ip_adapter_scale(0.2)


def test_ip_adapter_whose_scale_changes_in_the_middle_of_a_call():
    family = sd15.SIBLINGS["ip_adapter"]
    plain, fast = twins(family.pipeline, kind="modulation")
    arguments = {"guidance_scale": SCALE, "callback_on_step_end": during(set_image_scale)}
    sample(fast, family, guidance_scale=SCALE)
    assert_same(sample(fast, family, **arguments), sample(plain, family, **arguments))


def test_residuals_of_a_controlnet_move_with_every_step():
    family, pair = sd15.SIBLINGS["controlnet"], twins(sd15.pipeline, kind="modulation")
    control = lively(ControlNetModel.from_unet(pair[0].unet, conditioning_embedding_out_channels=(4, 8)), seed=1)
    others = [agd.share(pipe, StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=control)) for pipe in pair]
    for other in others:
        other.set_progress_bar_config(disable=True)
    arguments = {"guidance_scale": SCALE, "num_inference_steps": 6}
    expected = sample(others[0], family, **arguments)
    with own_forwards(pair[1].unet) as seen:
        for _ in range(2):
            assert_same(sample(others[1], family, **arguments), expected)
    assert len(seen) == RECORDED
    (program,) = programs(pair[1].unet)
    assert program.levels.count(Level.MOVING) == 1 + len(control.controlnet_down_blocks) + 1  # x_t, down, middle
    weaker = {**arguments, "controlnet_conditioning_scale": 0.2}
    assert_same(sample(others[1], family, **weaker), sample(others[0], family, **weaker))


# the user's own loop


@torch.no_grad()
def test_changes_between_the_forwards_of_one_guided_block():
    plain, fast = Holder(), Holder()
    agd.optimize(fast.unet)
    prompt = torch.randn(2, 5, 16)
    inputs = {"sample": noise(2), "timestep": torch.tensor(500), "encoder_hidden_states": prompt}
    seen = []
    with agd.guided(plain.unet, SCALE), agd.guided(fast.unet, SCALE):
        changes = [CHANGES[name] for name in ("base", "adapter", "processor", "module", "lora")]
        for change in (None, None, *changes, lambda pipe: prompt.mul_(-1), lambda pipe: noise_in(inputs)):
            if change is not None:
                change(plain)
            if change in changes:
                change(fast)
            seen.append(plain.unet(**inputs).sample)
            for _ in range(2):
                assert_same(fast.unet(**inputs).sample, seen[-1])
    assert all(differs(one, other) for one, other in pairwise(seen[1:]))


def noise_in(inputs):
    inputs["sample"] = noise(2, seed=4)


@torch.no_grad()
def test_another_guidance_scale_in_every_block():
    plain, fast = Holder(), Holder()
    agd.optimize(fast.unet)
    inputs = {"sample": noise(2), "timestep": torch.tensor(500), "encoder_hidden_states": torch.randn(2, 5, 16)}
    for scale in (2.0, 5.0, [2.0, 5.0], [5.0, 2.0], torch.tensor(3.0)):
        with agd.guided(plain.unet, scale):
            expected = plain.unet(**inputs).sample
        with agd.guided(fast.unet, scale):
            for _ in range(2):
                assert_same(fast.unet(**inputs).sample, expected)


def test_the_adapter_switched_off_in_the_middle_of_a_call():
    def switch_off(pipe):
        require_attachment(pipe).enabled = False

    pair = twins()
    assert_follows_within(pair, during(switch_off))


@torch.no_grad()
def test_changes_between_the_steps_of_a_loop_that_says_its_schedule():
    plain, fast = Holder(), Holder()
    agd.optimize(fast.unet)
    times, given = torch.tensor([900, 500, 20]), unet_inputs()
    with scoped(fast.unet, times), agd.guided(plain.unet, SCALE), agd.guided(fast.unet, SCALE):
        for t in times:
            assert_same(fast.unet(**{**given, "timestep": t}).sample, plain.unet(**{**given, "timestep": t}).sample)
            write_base(plain)
            write_base(fast)


def test_a_schedule_that_is_set_anew_in_the_middle_of_a_block():
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    agd.optimize(fast)
    schedule = [torch.tensor([900, 500, 100])]
    x, prompt = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    with torch.no_grad(), scoped(fast, lambda: schedule[0]), agd.guided(plain, SCALE), agd.guided(fast, SCALE):
        for t in (900, 500, 700, 300):
            if t == 700:
                schedule[0] = torch.tensor([700, 300])
            given = {"sample": x, "timestep": torch.tensor(t), "encoder_hidden_states": prompt}
            assert_same(fast(**given).sample, plain(**given).sample)


def test_the_engine_taken_off_in_the_middle_of_a_call():
    plain, fast = twins()
    call(fast)

    def callback(pipe, step, t, tensors):
        agd.optimize(pipe, None)
        return tensors

    assert_same(call(fast, callback_on_step_end=callback), call(plain))
    assert engine_of(fast.unet) is None
