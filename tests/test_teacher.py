"""Classifier-free guidance against a plain reading with two passes, and what a teacher is made from."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import agd_fast as agd
from agd_fast.teacher import as_teacher
from conftest import TINY_SPEC, TinyDenoiser, assert_as_exact, double, make_backbone, make_dit, make_unet, trained

NULLS = {"dit": {"class_labels": 5}, "tiny": {"label": 0}, "unet": {"encoder_hidden_states": 0.0}}


def split(backbone, inputs):
    inputs = dict(inputs)
    return inputs.pop(backbone.spec.sample), inputs.pop(backbone.spec.timestep), inputs


def two_passes(backbone, name, inputs, omega):
    """ε(∅) + ω·(ε(c) − ε(∅)), one sample and one forward at a time."""
    rows = []
    for index, scale in enumerate(omega.tolist()):
        one = {key: value[index : index + 1] for key, value in inputs.items()}
        cond = backbone(**one)
        uncond = backbone(**one | {key: torch.full_like(one[key], null) for key, null in NULLS[name].items()})
        rows.append((uncond + scale * (cond - uncond))[:, : 2 if name == "dit" else None])
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["dit", "unet", "tiny"])
@settings(max_examples=6, deadline=None, derandomize=True)
@given(scales=st.lists(st.floats(0, 8, width=32), min_size=1, max_size=4), seed=st.integers(0, 99))
@torch.no_grad()
def test_predict_cfg_is_two_passes(name, scales, seed):
    backbone = make_backbone(name)
    inputs, omega = backbone.inputs(len(scales), seed), torch.tensor(scales)
    found, cond = backbone.teacher().predict_cfg(*split(backbone, inputs), omega)
    exact = type(backbone)(double(backbone.denoiser), backbone.spec)
    exact_inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    plain, reference = (
        two_passes(model, name, arguments, omega) for model, arguments in ((backbone, inputs), (exact, exact_inputs))
    )
    assert_as_exact(found, plain, reference)
    ones = torch.ones_like(omega)
    plain, reference = (
        two_passes(model, name, arguments, ones) for model, arguments in ((backbone, inputs), (exact, exact_inputs))
    )
    assert_as_exact(cond, plain, reference)


def test_predict_cfg_in_one_forward_of_twice_the_batch(tiny):
    batches = []
    tiny.denoiser.register_forward_pre_hook(lambda module, args, kwargs: batches.append(len(kwargs["x"])), with_kwargs=True)
    tiny.teacher().predict_cfg(*split(tiny, tiny.inputs()), torch.tensor([2.0]))
    assert batches == [6]


def test_predict_leaves_the_learned_sigma_out(dit):
    inputs = dit.inputs()
    found = dit.teacher().predict(*split(dit, inputs))
    assert torch.equal(found, dit(**inputs)[:, :2])


def test_predict_cfg_while_armed_is_double_guidance(backbone):
    trained(agd.attach(backbone.denoiser, agd.AdapterConfig(hidden=2), spec=backbone.spec))
    teacher, omega = backbone.teacher(), torch.full((3,), 3.0)
    arguments = split(backbone, backbone.inputs())
    with torch.no_grad():
        expected = teacher.predict_cfg(*arguments, omega)[0]
        with agd.guided(teacher, 3.0):
            with pytest.raises(RuntimeError, match=r"while an adapter is armed .double guidance"):
                teacher.predict_cfg(*arguments, omega)
            with agd.disabled(teacher):
                assert torch.equal(teacher.predict_cfg(*arguments, omega)[0], expected)
            with teacher.base():
                assert torch.equal(teacher.predict_cfg(*arguments, omega)[0], expected)
        agd.unload(teacher)
        assert torch.equal(teacher.predict_cfg(*arguments, omega)[0], expected)


def towards_cond(uncond, cond, omega, share=1.0):
    """A rule that does not see ω."""
    return uncond + share * (cond - uncond)


@dataclass(frozen=True)
class Rule:
    share: float

    def __call__(self, uncond, cond, omega):
        return towards_cond(uncond, cond, omega, self.share)


@torch.no_grad()
def test_predict_cfg_follows_the_rule_of_guidance(tiny):
    arguments, seen = split(tiny, tiny.inputs()), []

    def rule(uncond, cond, omega):
        seen.append((uncond, cond, omega))
        return uncond - cond

    omega = torch.tensor([1.0, 2.0, 3.0])
    found, cond = tiny.teacher(guidance=rule).predict_cfg(*arguments, omega)
    ((uncond, seen_cond, seen_omega),) = seen
    assert torch.equal(found, uncond - cond)
    assert torch.equal(seen_cond, cond)
    assert torch.equal(seen_omega, omega)
    plain, plain_cond = tiny.teacher().predict_cfg(*arguments, omega)
    assert torch.equal(cond, plain_cond)
    assert torch.equal(plain, uncond + omega.view(-1, 1, 1, 1) * (cond - uncond))


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (towards_cond, "test_teacher.towards_cond"),
        (partial(towards_cond, share=0.5), "test_teacher.towards_cond(share=0.5)"),
        (partial(partial(towards_cond), share=0.5), "test_teacher.towards_cond(share=0.5)"),
        (Rule(0.5), "Rule(share=0.5)"),
    ],
)
def test_guidance_name_tells_rules_apart(tiny, rule, name):
    teacher = tiny.teacher(guidance=rule)
    assert teacher.guidance_name == name
    assert as_teacher(teacher, DDIMScheduler()).guidance_name == name
    assert tiny.teacher().guidance_name == "agd_fast.ops.guidance_combine"


def test_guidance_without_a_name_is_said(tiny):
    class Nameless:
        def __call__(self, uncond, cond, omega):
            return cond

    for rule in (lambda uncond, cond, omega: cond, Nameless(), partial(Nameless()), Rule(0.5).__call__):
        with pytest.raises(ValueError, match="a function of a module, a functools.partial of one"):
            _ = tiny.teacher(guidance=rule).guidance_name


def test_predict_agd_is_the_armed_forward(backbone):
    trained(agd.attach(backbone.denoiser, agd.AdapterConfig(hidden=2), spec=backbone.spec))
    teacher, omega = backbone.teacher(), torch.tensor([1.5, 3.0, 6.0])
    arguments = split(backbone, backbone.inputs())
    with torch.no_grad():
        found = teacher.predict_agd(*arguments, omega)
        with agd.guided(teacher, omega):
            assert torch.equal(found, teacher.predict(*arguments))
        assert not torch.equal(found, teacher.predict(*arguments))
        with agd.disabled(teacher), pytest.raises(ValueError, match="predict_agd expects .* found it disabled"):
            teacher.predict_agd(*arguments, omega)


def test_base_has_no_gradients(tiny):
    teacher = tiny.teacher()
    with teacher.base():
        assert not teacher.predict(*split(tiny, tiny.inputs())).requires_grad


@torch.no_grad()
def test_omega_offset_is_for_families_that_add_to_the_conditional_prediction(tiny):
    """cond + g·(cond − uncond), as Z-Image and Cosmos write it."""
    spec = agd.DenoiserSpec(**{**vars(TINY_SPEC), "omega_offset": 1.0})
    teacher = agd.Teacher(tiny.denoiser, DDIMScheduler(prediction_type="sample"), spec, sample_shape=(3, 4, 4))
    inputs, scale = tiny.inputs(), 2.5
    noise, labels = inputs["x"], inputs["label"]
    found = agd.sample(teacher, labels, guidance_scale=scale, steps=1, noise=noise)
    x, t = noise.double(), torch.zeros(3, dtype=torch.long)
    exact = double(tiny.denoiser)
    outputs = {}
    for key, model, sample in (("plain", tiny.denoiser, noise), ("reference", exact, x)):
        cond, uncond = model(sample, t, labels), model(sample, t, torch.zeros_like(labels))
        outputs[key] = cond + scale * (cond - uncond)
    scheduler = teacher.scheduler
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [0]
    for key, value in outputs.items():
        outputs[key] = scheduler.step(value, 0, x if key == "reference" else noise, return_dict=False)[0]
    assert_as_exact(found, outputs["plain"], outputs["reference"])


def test_teacher_keeps_the_denoiser_in_eval_mode(dit):
    dit.denoiser.train()
    dit.teacher()
    assert not any(module.training for module in dit.denoiser.modules())


def test_teacher_reads_what_it_can(dit, unet):
    teacher = dit.teacher(FlowMatchEulerDiscreteScheduler())
    assert teacher.sample_shape == (2, 4, 4)
    assert teacher.prediction_type == "flow_prediction"
    assert teacher.guided_channels == 2
    assert teacher.name == "DiTTransformer2DModel"
    assert unet.teacher().guided_channels is None
    assert unet.teacher().prediction_type == "epsilon"
    assert agd.Teacher(make_unet(sample_size=(4, 6)), DDIMScheduler()).sample_shape == (2, 4, 6)


def test_teacher_says_what_is_wrong():
    scheduler, tiny = DDIMScheduler(), TinyDenoiser()
    shape = {"sample_shape": (3, 4, 4)}
    with pytest.raises(TypeError, match=r"no DenoiserSpec is known for TinyDenoiser"):
        agd.Teacher(tiny, scheduler)
    with pytest.raises(ValueError, match=r"sample shape of TinyDenoiser .*sample_shape=\(C, H, W\)"):
        agd.Teacher(tiny, scheduler, TINY_SPEC)
    with pytest.raises(TypeError, match=r"expected a diffusers scheduler beside the denoiser, found NoneType"):
        agd.Teacher(tiny, None, TINY_SPEC, **shape)
    spec = agd.DenoiserSpec(**{**vars(TINY_SPEC), "prediction_type": "v_prediction"})
    with pytest.raises(ValueError, match=r"spec says prediction_type='v_prediction', the scheduler has 'epsilon'"):
        agd.Teacher(tiny, scheduler, spec, **shape)
    spec = agd.DenoiserSpec(**{**vars(TINY_SPEC), "sample": "sample", "timestep": "time"})
    with pytest.raises(ValueError, match=r"\['sample', 'time'\], but TinyDenoiser.forward takes \['x', 't', 'label'\]"):
        agd.Teacher(tiny, scheduler, spec, **shape)


def test_conditions_from_labels_or_by_name(dit, tiny, unet):
    assert dit.teacher().conditions(range(3))["class_labels"].tolist() == [0, 1, 2]
    assert tiny.teacher().conditions([1, 4])["label"].tolist() == [1, 4]
    assert tiny.teacher().conditions(conditions={"label": torch.tensor([2])})["label"].tolist() == [2]
    prompts = torch.randn(2, 5, 6)
    assert torch.equal(unet.teacher().conditions(conditions={"encoder_hidden_states": prompts})["encoder_hidden_states"], prompts)


def test_conditions_say_what_is_missing_unknown_or_out_of_range(dit, tiny, unet):
    with pytest.raises(ValueError, match=r"missing \['class_labels'\], unknown none"):
        dit.teacher().conditions()
    with pytest.raises(ValueError, match=r"missing \['encoder_hidden_states'\], unknown \['prompt'\]"):
        unet.teacher().conditions(conditions={"prompt": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"class_labels must lie in 0..5; found 0..6"):
        dit.teacher().conditions([0, 6])
    with pytest.raises(ValueError, match=r"label must lie in 0..4; found -1..2"):
        tiny.teacher().conditions([-1, 2])
    with pytest.raises(ValueError, match=r"one positive length, found .*'class_labels': 0"):
        dit.teacher().conditions([])
    lengths = {"encoder_hidden_states": torch.zeros(2, 5, 6), "class_labels": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"one positive length, found .*'encoder_hidden_states': 2, 'class_labels': 3"):
        unet.teacher().conditions(conditions=lengths)


def test_null_needs_a_value_from_somebody(unet):
    prompts = torch.randn(2, 5, 6)
    empty = torch.randn(1, 5, 6)
    teacher = agd.Teacher(unet.denoiser, DDIMScheduler(), null_condition={"encoder_hidden_states": empty})
    assert torch.equal(teacher.null({"encoder_hidden_states": prompts})["encoder_hidden_states"], empty.expand(2, 5, 6))
    teacher = agd.Teacher(unet.denoiser, DDIMScheduler())
    with pytest.raises(ValueError, match=r"null value of 'encoder_hidden_states' is unknown; .*null_condition="):
        teacher.null({"encoder_hidden_states": prompts})


def test_as_teacher(dit):
    scheduler, other = DDIMScheduler(), FlowMatchEulerDiscreteScheduler()
    teacher = as_teacher(dit.denoiser, scheduler)
    assert as_teacher(teacher) is teacher
    assert as_teacher(teacher, other).scheduler is other
    assert teacher.scheduler is scheduler
    with pytest.raises(TypeError, match=r"found a bare DiTTransformer2DModel"):
        as_teacher(make_dit())


def test_null_is_never_guessed(unet):
    """A pooled prompt has an unconditional value of its own; time ids do not."""
    conditions = {
        "encoder_hidden_states": torch.randn(2, 5, 6),
        "added_cond_kwargs.text_embeds": torch.randn(2, 7),
        "added_cond_kwargs.time_ids": torch.randn(2, 6),
    }
    teacher = unet.teacher()
    with pytest.raises(ValueError, match="null value of 'added_cond_kwargs.text_embeds' is unknown"):
        teacher.null(conditions)
    pooled = torch.randn(1, 7)
    teacher.null_condition = {**teacher.null_condition, "added_cond_kwargs.text_embeds": pooled}
    null = teacher.null(conditions)
    assert torch.equal(null["added_cond_kwargs.text_embeds"], pooled.expand(2, 7))
    assert torch.equal(null["added_cond_kwargs.time_ids"], conditions["added_cond_kwargs.time_ids"])


def test_predict_casts_conditions_to_the_base(unet):
    unet.denoiser.bfloat16()
    inputs = unet.inputs(2)
    sample, t = inputs["sample"].bfloat16(), inputs["timestep"]
    prompt = {"encoder_hidden_states": inputs["encoder_hidden_states"]}
    assert prompt["encoder_hidden_states"].dtype == torch.float32
    assert unet.teacher().predict(sample, t, prompt).dtype == torch.bfloat16


def test_teacher_calls_the_compiled_denoiser_it_was_given(tiny):
    counter = CompileCounter()
    compiled = torch.compile(tiny.denoiser, backend=counter)
    plain = agd.sample(tiny.teacher(), [1, 2], steps=2, seed=0)
    teacher = agd.Teacher(compiled, DDIMScheduler(), tiny.spec, sample_shape=(3, 4, 4))
    found = agd.sample(as_teacher(teacher, DDIMScheduler()), [1, 2], steps=2, seed=0)
    assert counter.frame_count > 0
    assert teacher.denoiser is tiny.denoiser
    assert torch.equal(found, plain)
