"""Callbacks of a wrapped pipeline's call, which read and write its guidance scale."""

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SD3CFGCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback

import agd_fast as agd
from helpers_engine import assert_same, differs, reasons, twins
from helpers_families import attach_trained, run
from helpers_pipelines import SCALE, attach, forwards, no_warnings, quiet, sample
from tiny import FAMILIES, sd15

SD15 = sd15.FAMILY
STEPS = SD15.call["num_inference_steps"]
EMBEDS = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
CUTOFFS = {"sd15": SDCFGCutoffCallback, "sdxl": SDXLCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}


def cutoff(name, step):
    return CUTOFFS[name](cutoff_step_ratio=None, cutoff_step_index=step)


def written(values, name="_guidance_scale"):
    """A callback that writes a scale after some of the steps."""

    def callback(pipe, step, t, tensors):
        if step in values:
            setattr(pipe, name, values[step])
        return tensors

    return callback


def two(pipe, **arguments):
    return sample(pipe, SD15, 2, **arguments)


@pytest.mark.parametrize("name", CUTOFFS)
def test_a_cutoff_of_diffusers_is_an_interval_for_one_prompt_and_for_two(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe)
    for rows in ((0,), (0, 1)):
        given = {"rows": rows, "guidance_scale": SCALE}
        expected = run(pipe, family, **given, guidance_interval=(0.0, 0.5))
        with no_warnings():
            found = run(pipe, family, **given, callback_on_step_end=cutoff(name, 1))
            joined = run(pipe, family, **given, callback_on_step_end=MultiPipelineCallbacks([cutoff(name, 1)]))
        assert torch.equal(found, expected) and torch.equal(joined, expected)
        assert not torch.equal(found, run(pipe, family, **given))


def test_what_a_callback_writes_is_the_scale_from_then_on(wrapped):
    expected = two(wrapped, guidance_scale=lambda done: [4.0, 2.0] if done < 2 / STEPS else [3.0, 1.0])
    with forwards(wrapped) as seen, no_warnings():
        found = two(wrapped, guidance_scale=[4.0, 2.0], callback_on_step_end=written({1: [3.0, 0.5]}))
    assert torch.equal(found, expected)
    assert seen == [2] * STEPS
    assert quiet(wrapped)


def test_a_scale_that_is_written_holds_inside_the_interval_alone(wrapped):
    interval = (0.25, 0.75)
    expected = two(wrapped, guidance_scale=lambda done: 4.0 if done < 2 / STEPS else 3.0, guidance_interval=interval)
    given = {"guidance_scale": 4.0, "guidance_interval": interval}
    assert torch.equal(two(wrapped, **given, callback_on_step_end=written({1: 3.0})), expected)


@pytest.mark.parametrize("scale", [4.0, [4.0, 2.0], torch.tensor([4.0, 2.0]), lambda done: [5.0, 4.0 - done]])
def test_a_callback_finds_the_pipelines_own_guidance_off(wrapped, scale):
    """And what it wrote too: the tensors that it is handed have no unconditional half at any scale."""
    seen, expected = [], two(wrapped, guidance_scale=scale)

    def callback(pipe, step, t, tensors):
        seen.append((pipe.guidance_scale, pipe.do_classifier_free_guidance, len(tensors["prompt_embeds"])))
        if step == STEPS - 1:
            pipe._guidance_scale = 3.0  # as late as that, without effect
        return tensors

    assert torch.equal(two(wrapped, guidance_scale=scale, callback_on_step_end=callback, **EMBEDS), expected)
    assert seen == [(1.0, False, 2)] * STEPS
    assert wrapped.guidance_scale == 1.0 and type(wrapped._guidance_scale) is float


def test_writing_the_number_that_is_there_ends_guidance(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE, guidance_interval=(0.0, 0.5))
    assert torch.equal(sample(wrapped, SD15, guidance_scale=SCALE, callback_on_step_end=written({1: 1.0})), expected)


def test_a_call_without_guidance_may_begin_to_guide(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE, guidance_interval=(0.5, 1.0))
    with forwards(wrapped) as seen:
        found = sample(wrapped, SD15, guidance_scale=1.0, callback_on_step_end=written({1: SCALE}))
    assert torch.equal(found, expected)
    assert seen == [1] * STEPS


def test_a_call_without_guidance_stays_so_where_a_callback_leaves_it(pipe):
    base = sample(pipe, SD15, guidance_scale=1.0)
    attach(pipe, identity_at_one=False)
    for further in ({}, {"guidance_interval": (0.0, 0.5)}):
        found = sample(pipe, SD15, guidance_scale=1.0, callback_on_step_end=written({}), **further)
        assert torch.equal(found, base)


def test_a_scale_that_is_written_is_in_the_familys_convention():
    family = FAMILIES["zimage"]  # ω = g + 1
    pipe = family.pipeline()
    attach_trained(pipe, identity_at_one=False)
    for value in (2.0, 0.0):
        expected = run(pipe, family, guidance_scale=lambda done, value=value: 4.0 if done < 0.5 else value)
        if value == 0.0:
            expected = run(pipe, family, guidance_scale=4.0, guidance_interval=(0.0, 0.5))
        found = run(pipe, family, guidance_scale=4.0, callback_on_step_end=written({1: value}))
        assert torch.equal(found, expected)


def test_two_denoisers_have_each_their_own_scale():
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    attach_trained(pipe)
    given = {"guidance_scale": 4.0, "guidance_scale_2": 3.0}
    full = run(pipe, family, **given)
    expected = run(pipe, family, guidance_scale=4.0, guidance_scale_2=0.0)
    found = run(pipe, family, **given, callback_on_step_end=written({0: 0.0}, "_guidance_scale_2"))
    assert torch.equal(found, expected) and not torch.equal(found, full)


@pytest.mark.parametrize(("value", "second"), [(0.0, 0.0), (3.0, 5.0)])
def test_ending_the_first_denoisers_guidance_ends_the_seconds(value, second):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    attach_trained(pipe)
    given = {"guidance_scale": 4.0, "guidance_scale_2": 5.0}
    expected = run(pipe, family, guidance_scale=lambda done: value if done else 4.0, guidance_scale_2=second)
    assert torch.equal(run(pipe, family, **given, callback_on_step_end=written({0: value})), expected)


@pytest.mark.parametrize("wrong", ["4", None, [1.0, 2.0, 3.0], float("nan")])
def test_a_scale_that_cannot_be_is_an_error(wrapped, wrong):
    with pytest.raises((TypeError, ValueError), match=r"expected one (finite guidance scale|number)"):
        two(wrapped, guidance_scale=SCALE, callback_on_step_end=written({0: wrong}))
    assert quiet(wrapped)


def test_inside_guided_a_callback_decides_nothing(wrapped):
    expected = sample(wrapped, SD15, guidance_scale=SCALE)
    with agd.guided(wrapped, SCALE):
        assert torch.equal(sample(wrapped, SD15, callback_on_step_end=written({})), expected)
        with pytest.raises(ValueError, match=r"expected guidance_scale left alone by callbacks, found 2.0"):
            sample(wrapped, SD15, callback_on_step_end=written({0: 2.0}))


def test_a_callback_that_cuts_off_a_half_that_is_not_there_leaves_all_prompts(wrapped):
    """As diffusers' documentation has it, where the batch is [unconditional, conditional]."""

    def callback(pipe, step, t, tensors):
        if step == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    expected = two(wrapped, guidance_scale=SCALE, guidance_interval=(0.0, 0.5))
    assert torch.equal(two(wrapped, guidance_scale=SCALE, callback_on_step_end=callback, **EMBEDS), expected)


def test_so_does_one_that_cuts_a_list_of_prompts():
    family = FAMILIES["zimage"]
    pipe = family.pipeline()
    attach_trained(pipe)

    def callback(pipe, step, t, tensors):
        return {**tensors, "prompt_embeds": tensors["prompt_embeds"][-1:]}

    expected = run(pipe, family, guidance_scale=SCALE)
    assert torch.equal(run(pipe, family, guidance_scale=SCALE, callback_on_step_end=callback, **EMBEDS), expected)


def test_a_callbacks_own_embeddings_are_taken_as_they_are(wrapped):
    """Also one for two prompts: the denoiser says that it does not do."""

    def callback(pipe, step, t, tensors):
        tensors["prompt_embeds"] = torch.zeros_like(tensors["prompt_embeds"].chunk(2)[-1])
        return tensors

    with pytest.raises(RuntimeError, match="must match the size"):
        two(wrapped, guidance_scale=SCALE, callback_on_step_end=callback, **EMBEDS)
    assert quiet(wrapped)


def test_callbacks_of_the_base_are_its_own(pipe):
    given = {"guidance_scale": SCALE, "callback_on_step_end": cutoff("sd15", 1)}
    base = sample(pipe, SD15, **given)
    attach(pipe)
    with agd.disabled(pipe), forwards(pipe) as seen:
        assert torch.equal(sample(pipe, SD15, **given), base)
    assert seen == [2, 2, 1, 1]


# on the engine


@pytest.mark.parametrize(
    "given", [{"guidance_scale": SCALE}, {"guidance_scale": lambda done: SCALE - done}], ids=["one", "varies"]
)
@pytest.mark.parametrize("values", [{1: 0.0}, {0: 3.0, 1: 2.0, 2: 5.0}], ids=["cut off", "every step"])
def test_scales_that_are_written_on_the_engine(pair, given, values):
    plain, fast = pair
    arguments = {**given, "callback_on_step_end": written(values)}
    expected = two(plain, **arguments)
    assert differs(expected, two(plain, **given))
    for _ in range(2):
        assert_same(two(fast, **arguments), expected)
    assert not reasons(fast)


@pytest.fixture(scope="module")
def pair():
    return twins()
