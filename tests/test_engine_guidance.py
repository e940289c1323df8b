"""Guidance that changes from step to step, with the engine and without it."""

import pytest
import torch
from diffusers import HeunDiscreteScheduler

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.scope import scope_of
from helpers_engine import assert_same, call, differs, programs, reasons, twins
from helpers_families import attach_trained, run
from helpers_pipelines import sample
from tiny import FAMILIES, sd15
from tiny.text import prompts

STEPS = 4
VARYING = {
    "interval": {"guidance_interval": (0.25, 0.75)},
    "function": {"guidance_scale": lambda fraction: 2 + 5 * fraction},
    "one a prompt": {"guidance_scale": [2.0, 6.0]},
    "function, one a prompt": {"guidance_scale": lambda fraction: [2.0, 3 + 4 * fraction]},
    "tensor": {"guidance_scale": lambda fraction: torch.tensor([2.0 + fraction, 5.0])},
    "all": {"guidance_scale": lambda fraction: [2.0, 3 + 4 * fraction], "guidance_interval": (0.25, 1.0)},
}


@pytest.fixture(scope="module")
def pair():
    return twins()


def two(pipe, **arguments):
    return call(pipe, prompt=prompts(2), **arguments)


@pytest.mark.parametrize("name", VARYING)
def test_guidance_that_varies_is_the_same_on_the_engine(pair, name):
    plain, fast = pair
    expected = two(plain, **VARYING[name])
    assert differs(expected, two(plain))
    for _ in range(2):
        assert_same(two(fast, **VARYING[name]), expected)
    assert not reasons(fast)


def test_guidance_that_varies_takes_one_program_for_each_shape_alone(pair):
    before = [*programs(pair[1].unet)]
    for interval in ((0.0, 0.25), (0.5, 1.0)):
        two(pair[1], guidance_interval=interval)
    two(pair[1], guidance_scale=lambda fraction: 6 - fraction)
    assert programs(pair[1].unet) == before


@pytest.mark.parametrize("optimized", [False, True])
def test_a_function_is_asked_at_the_fraction_of_steps_that_are_done(pair, optimized):
    asked = []

    def scale(fraction):
        asked.append(fraction)
        return 3.0

    call(pair[optimized], guidance_scale=scale)
    assert asked == [0.0, *(step / STEPS for step in range(STEPS))]  # once before anything runs, so that errors come first


def handed(pipe, **arguments):
    """What the scheduler is handed at each step."""
    seen, step = [], pipe.scheduler.step

    def watch(output, *args, **kwargs):
        seen.append(output.clone())
        return step(output, *args, **kwargs)

    pipe.scheduler.step = watch
    try:
        call(pipe, **arguments)
    finally:
        del pipe.scheduler.step
    return seen


def test_steps_outside_the_interval_are_the_base():
    plain, fast = twins()
    base = handed(plain, guidance_scale=1.0)
    for pipe, apart in ((plain, lambda one, other: not torch.equal(one, other)), (fast, differs)):
        found = handed(pipe, guidance_interval=(0.5, 1.0))
        assert [apart(one, other) for one, other in zip(found, base, strict=True)] == [False, False, True, True]


def test_a_function_that_is_constant_is_that_number(pair):
    plain = pair[0]
    for pipe in pair:
        assert_same(two(pipe, guidance_scale=lambda fraction: [3.0, 5.0]), two(plain, guidance_scale=[3.0, 5.0]))
    assert torch.equal(two(plain, guidance_scale=lambda fraction: 3.0), two(plain, guidance_scale=3.0))


def test_a_function_of_one_is_the_base(pair):
    base = two(pair[0], guidance_scale=1.0)
    for pipe in pair:
        assert_same(two(pipe, guidance_scale=lambda fraction: 1.0), base)


@pytest.mark.parametrize("name", ["interval", "function", "all"])
def test_schedules_that_visit_a_timestep_twice(name):
    pair = twins()
    for pipe in pair:
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    plain, fast = pair
    expected = two(plain, **VARYING[name])
    times = plain.scheduler.timesteps
    assert len(times.unique()) < len(times)
    for _ in range(2):
        assert_same(two(fast, **VARYING[name]), expected)


@pytest.mark.parametrize("denoising_end", [0.5, 0.8, 0.9])
def test_a_call_that_ends_before_its_schedule_does(denoising_end):
    """SDXL with a refiner: the base makes the first of the steps."""
    family = FAMILIES["sdxl"]
    plain, fast = twins(family.pipeline, kind="modulation")
    arguments = {"num_inference_steps": 10, "denoising_end": denoising_end, "guidance_scale": lambda fraction: 2 + 5 * fraction}
    expected = sample(plain, family, **arguments)
    for _ in range(2):
        assert_same(sample(fast, family, **arguments), expected)


def test_a_call_that_begins_within_its_schedule():
    family = sd15.SIBLINGS["img2img"]
    plain, fast = twins(family.pipeline, kind="modulation")
    arguments = {"num_inference_steps": 8, "strength": 0.5, "guidance_scale": lambda fraction: 2 + 5 * fraction}
    expected = sample(plain, family, **arguments)
    for _ in range(2):
        assert_same(sample(fast, family, **arguments), expected)


@pytest.mark.parametrize("name", ["dit", "sd3", "wan22"])
def test_other_families_whose_guidance_varies(name):
    family = FAMILIES[name]
    plain, fast = family.pipeline(), family.pipeline()
    for pipe in (plain, fast):
        attach_trained(pipe)
    agd.optimize(fast)
    varying = {"guidance_scale": lambda fraction: [2.0, 3 + 4 * fraction], "guidance_interval": (0.25, 1.0)}
    expected = run(plain, family, **varying)
    assert differs(expected, run(plain, family, **family.guided))
    for _ in range(2):
        assert_same(run(fast, family, **varying), expected)


def test_a_call_leaves_nothing_armed(pair):
    for pipe in pair:
        call(pipe, **VARYING["function"], **VARYING["interval"])
        attachment = attachment_of(pipe)
        assert attachment.omega is None and attachment.gate is None and scope_of(pipe.unet) is None


# what is refused


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": lambda fraction: [2.0, 3.0, 4.0]}, r"guidance_scale has 3 values for 2 prompt\(s\)"),
        (
            {"guidance_scale": lambda fraction: [2.0] * (2 if fraction == 0 else 3)},
            r"guidance_scale has 3 values for 2 prompt\(s\)",
        ),
        ({"guidance_scale": lambda fraction: float("nan")}, "one finite guidance scale"),
        ({"guidance_scale": lambda fraction: 3.0, "negative": "cfg", "negative_prompt": "red"}, "found a function of the step"),
        ({"guidance_scale": 3.0, "guidance_interval": (0.5, 0.5)}, "guidance_interval must be"),
    ],
)
def test_guidance_that_cannot_be(pair, optimized, arguments, message):
    with pytest.raises(ValueError, match=message):
        two(pair[optimized], **arguments)
    assert_same(two(pair[optimized]), two(pair[0]))


def test_a_function_warns_once_outside_of_the_trained_range(pair):
    with pytest.warns(UserWarning, match=r"ω from 2 to 80 lies outside") as found:
        call(pair[1], guidance_scale=lambda fraction: 2 + 104 * fraction)
    assert len(found) == 1
