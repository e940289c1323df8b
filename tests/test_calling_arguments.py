"""What a wrapped pipeline's call takes: scales per prompt, a guidance interval, a negative prompt."""

import inspect
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline

import agd_fast as agd
from agd_fast.attaching import attachment_of, share
from conftest import assert_as_exact
from helpers_families import attach_trained, run
from helpers_pipelines import SCALE, attach, exact, forwards, no_warnings, noise, quiet, sample
from tiny import FAMILIES, sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]


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
        (
            {"prompt": "red cat", "guidance_scale": []},
            r"one finite guidance scale or one a sample \[B\], found shape \(0,\): \[\]",
        ),
    ],
)
def test_scales_that_do_not_go_with_the_prompts_are_an_error(wrapped, given, message):
    with pytest.raises(ValueError, match=message):
        wrapped(**given, **SD15.call)
    assert quiet(wrapped)


@pytest.mark.parametrize("wrong", ["7.5", {"scale": 2.0}, [2.0, None]])
@pytest.mark.parametrize("further", [{}, {"negative_prompt": "blurred", "negative": "cfg"}], ids=["one pass", "two"])
def test_scales_that_are_no_numbers_are_an_error(wrapped, wrong, further):
    found = re.escape(repr(wrong))
    for scale in (wrong, lambda done: wrong) if not further else (wrong,):
        with pytest.raises(TypeError, match=rf"expected one finite guidance scale or one a sample \[B\], found {found}"):
            sample(wrapped, SD15, guidance_scale=scale, **further)
    assert quiet(wrapped)


def test_a_function_that_gives_none_is_an_error(wrapped):
    with pytest.raises(TypeError, match="expected one finite guidance scale .* found None"):
        sample(wrapped, SD15, guidance_scale=lambda done: None)


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


def test_every_schedule_of_a_call_is_gone_through_from_its_beginning():
    """FreeInit's fast sampling makes two steps, then four."""
    family = FAMILIES["animatediff"]
    pipe = family.pipeline()
    attach_trained(pipe)
    pipe.enable_free_init(num_iters=2, use_fast_sampling=True)
    attachment, seen = attachment_of(pipe), []
    pipe.unet.register_forward_pre_hook(lambda *_: seen.append(None if attachment.omega is None else attachment.omega.item()))
    sample(pipe, family, guidance_scale=lambda done: 2 + 4 * done, guidance_interval=(0.0, 0.5))
    assert seen == [2.0, None, 2.0, 3.0, None, None]


@pytest.mark.parametrize(
    "interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.5, 1.1), 0.5, (0.5,), ("0", "1"), {0.0: 1, 0.5: 2}, torch.ones(2)]
)
@pytest.mark.parametrize("scale", [SCALE, 1.0])
def test_bad_guidance_interval_is_an_error(wrapped, interval, scale):
    with pytest.raises(ValueError, match=r"guidance_interval must be .* both from 0 to 1, found ") as caught:
        sample(wrapped, SD15, guidance_scale=scale, guidance_interval=interval)
    assert str(caught.value).endswith(f"found {interval!r}")
    assert quiet(wrapped)


def test_a_guidance_interval_where_no_adapter_acts_is_an_error(wrapped):
    partner = share(wrapped, StableDiffusionPipeline.from_pipe(wrapped))
    arguments = {"guidance_scale": SCALE, "guidance_interval": (0.0, 0.5)}
    message = r"in this call none does .* expected no guidance_interval, found \(0\.0, 0\.5\)"
    with pytest.raises(ValueError, match=message):
        sample(wrapped, SD15, **arguments, negative_prompt="blurred", negative="cfg")
    with agd.disabled(wrapped), pytest.raises(ValueError, match=message):
        sample(wrapped, SD15, **arguments)
    agd.unload(wrapped)
    with pytest.raises(ValueError, match=message):
        sample(partner, SD15, **arguments)


# negative prompts


@pytest.mark.parametrize("negative", ["blurred", ["blurred"], None, "", [""]])
def test_negative_prompt_is_left_out_with_a_warning(wrapped, negative):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with pytest.warns(UserWarning, match="negative prompt is left out") if negative not in (None, "", [""]) else no_warnings():
        assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, negative_prompt=negative), expected)


@pytest.mark.parametrize("name", ["cosmos", "sdxl"])
def test_no_negative_prompt_is_another_where_the_pipeline_has_its_own(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    for trained_for in (None, ""):
        attach_trained(pipe, negative_prompt=trained_for)
        said = "left out: this adapter was trained for no negative prompt; negative='cfg' runs"
        with pytest.warns(UserWarning, match=said) if trained_for is None else no_warnings():
            run(pipe, family, guidance_scale=SCALE, negative_prompt="")
        with no_warnings():
            run(pipe, family, guidance_scale=SCALE)
        agd.unload(pipe)


def test_an_empty_negative_prompt_is_another_where_the_family_has_one_that_is_not():
    family = FAMILIES["qwenimage"]
    pipe = family.pipeline()
    attach_trained(pipe)
    for negative in (" ", ""):
        with pytest.warns(UserWarning, match="was trained for the negative prompt ' ';") if not negative else no_warnings():
            run(pipe, family, true_cfg_scale=SCALE, negative_prompt=negative)


def test_an_empty_negative_prompt_is_none_where_sdxl_has_no_zeros_for_it():
    family = FAMILIES["sdxl"]
    pipe = family.pipeline()
    attach_trained(pipe)
    _, negative, _, negative_pooled = torch.no_grad()(pipe.encode_prompt)(["a red cat"] * 2, negative_prompt=[""] * 2)
    given = {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
    with pytest.warns(UserWarning, match="trained for no negative prompt, and negative_prompt_embeds are not"):
        sample(pipe, family, 2, guidance_scale=SCALE, **given)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    with no_warnings():
        sample(pipe, family, 2, guidance_scale=SCALE, **given)
        sample(pipe, family, 2, guidance_scale=SCALE, negative_prompt=["", ""])


@pytest.mark.parametrize("encodes", [True, False])
def test_negative_embeddings_are_left_out_with_a_warning(wrapped, encodes):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    embeds = wrapped.encode_prompt(SD15.inputs(1)["prompt"], "cpu", 1, False)[0].detach()
    given = {"guidance_scale": SCALE, "prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": embeds}
    why = "are not those that this pipeline makes of it"
    if not encodes:
        wrapped.text_encoder, why = None, "may be others, as this pipeline has none to compare with"
    message = f"left out: this adapter was trained for the empty prompt, and negative_prompt_embeds {why}; negative='cfg'"
    with pytest.warns(UserWarning, match=message):
        assert torch.equal(sample(wrapped, SD15, **given), expected)


def test_negative_embeddings_are_compared_with_what_the_text_encoder_makes_now(wrapped):
    def given():
        negative = torch.no_grad()(wrapped.encode_prompt)(["a"], "cpu", 1, True)[1]
        sample(wrapped, SD15, guidance_scale=SCALE, negative_prompt_embeds=negative)

    with no_warnings():
        given()
        with torch.no_grad():  # as a fused LoRA does
            for parameter in wrapped.text_encoder.parameters():
                parameter.add_(0.01)
        given()


NEGATIVES = {
    "sd15": {},
    "sdxl": {},
    "sd3": {"prompt_2": None, "prompt_3": None, "max_sequence_length": 16},
    "pixart": {"max_sequence_length": 16},
    "wan": {"max_sequence_length": 16},
}


@pytest.mark.parametrize("name", NEGATIVES)
@pytest.mark.parametrize("trained_for", [None, "a blue ship"])
def test_negative_embeddings_of_what_the_adapter_was_trained_for_are_known(name, trained_for):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe, negative_prompt=trained_for)
    names = [*inspect.signature(pipe.encode_prompt).parameters]
    given = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True, **NEGATIVES[name]}
    given = {key: value for key, value in given.items() if key in names}

    def negatives(text):
        negative = {} if text is None else {"negative_prompt": [text] * 2}
        found = torch.no_grad()(pipe.encode_prompt)(["a", "b"], **negative, **given)
        if name == "pixart":
            return {"negative_prompt_embeds": found[2], "negative_prompt_attention_mask": found[3]}
        pooled = {"negative_pooled_prompt_embeds": found[3]} if len(found) > 3 else {}
        return {"negative_prompt_embeds": found[1], **pooled}

    with no_warnings(), forwards(pipe) as seen:
        sample(pipe, family, 2, guidance_scale=SCALE, **negatives(trained_for), negative="cfg")
    assert {*seen} == {2}
    none = "no negative prompt" if name == "sdxl" else "the empty prompt"
    with pytest.warns(UserWarning, match=f"trained for {'the negative prompt .a blue' if trained_for else none}"):
        sample(pipe, family, 2, guidance_scale=SCALE, **negatives("a red cat"))


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
    with agd.guided(pipe, SCALE), pytest.raises(ValueError, match=r"agd_fast.guided\(...\) decides"):
        sample(pipe, SD15, 2, **{**arguments, "guidance_scale": scale}, negative="cfg")


@pytest.mark.parametrize("name", ["sd15", "zimage"])  # ω = g and ω = g + 1
def test_negative_cfg_inside_guided_is_at_its_scale(name):
    family = FAMILIES[name]
    pipe = family.pipeline()

    def blurred(**arguments):
        return sample(pipe, family, negative_prompt=["blurred"], **arguments)

    base = blurred(guidance_scale=SCALE)
    attach(pipe)
    for off in ({}, {"guidance_scale": attachment_of(pipe).spec.pipeline.cfg_off_value}):
        with agd.guided(pipe, SCALE), no_warnings():
            assert torch.equal(blurred(**off, negative="cfg"), base)


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
