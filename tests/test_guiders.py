"""Guiders of diffusers as teachers: an adapter learns what the guider itself makes of the denoiser."""

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.hooks import LayerSkipConfig

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.files import read_json
from agd_fast.guiders.teaching import gives_cond_at_one, name_of_guider, require_teachable, scale_for
from agd_fast.pipelines import PipelineTeacher
from tiny import FAMILIES


def recorded(name, guider, omega=4.0, attach=False):
    """States, unconditional predictions included, of one guided run of a family's pipeline."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    if attach:
        agd.attach(pipe, agd.AdapterConfig(hidden=2))
    call = {key: value for key, value in family.call.items() if key != "num_inference_steps"}
    teacher = PipelineTeacher.of(pipe, inputs=family.inputs(2), call=call, guider=guider)
    asked, states = [], []
    ask = teacher._ask_guider
    teacher._ask_guider = lambda step, *rest: (asked.append(step), ask(step, *rest))[1]

    def visit(state):
        states.append((state, state.cond(), teacher._unguided(asked[-1].unconditional) if asked else None))
        return state.target

    rows = torch.arange(2)
    teacher.run({"input": rows}, rows, torch.full((2,), omega), 4, visit, generator=torch.Generator())
    return teacher, states


class ScalesAFrequency(ClassifierFreeGuidance):
    """As diffusers' FrequencyDecoupledGuidance, which needs a further library."""

    def __init__(self):
        super().__init__()
        self.guidance_scale = [10.0, 5.0]


def zero_star(cond, uncond):
    scale = cfg_zero_star_scale(cond.flatten(1), uncond.flatten(1)).view(-1, 1, 1, 1)
    return uncond * scale + 4.0 * (cond - uncond * scale)


@pytest.mark.parametrize(
    ("guider", "rule"),
    [
        (ClassifierFreeGuidance(), lambda cond, uncond: uncond + 4.0 * (cond - uncond)),
        (ClassifierFreeGuidance(use_original_formulation=True), lambda cond, uncond: cond + 3.0 * (cond - uncond)),
        (ClassifierFreeZeroStarGuidance(zero_init_steps=0), zero_star),
        (
            AdaptiveProjectedGuidance(adaptive_projected_guidance_rescale=2.0, eta=0.3),
            lambda cond, uncond: normalized_guidance(cond, uncond, 4.0, None, 0.3, 2.0),
        ),
    ],
    ids=["cfg", "cfg original", "cfg-zero*", "apg"],
)
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_target_is_what_the_guider_makes_of_both_predictions(name, guider, rule):
    _, states = recorded(name, guider)
    assert len(states) == 4
    for state, cond, uncond in states:
        assert torch.equal(state.target, rule(cond, uncond))
    assert guider.guidance_scale == 7.5  # as it was found


BLOCKS = {"sdxl": "down_blocks.1.attentions.0.transformer_blocks", "wan": "blocks", "pixart": "transformer_blocks"}


@pytest.mark.parametrize("attach", [False, True], ids=["plain", "attached"])
@pytest.mark.parametrize("name", BLOCKS)
def test_guiders_that_skip_layers_teach_and_leave_no_hook(name, attach):
    config = LayerSkipConfig(indices=[0], fqn=BLOCKS[name])
    slg = SkipLayerGuidance(skip_layer_config=config, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0)
    teacher, states = recorded(name, slg, attach=attach)
    skipped = [state.target - (uncond + 4.0 * (cond - uncond)) for state, cond, uncond in states]
    assert not skipped[0].any()  # diffusers starts after the first step
    assert all(one.any() for one in skipped[1:])
    call = states[-1][0]
    again = teacher.predict(call.sample, call.timestep, call.arguments)
    assert torch.equal(again, states[-1][1])  # no layer is skipped any more


def test_auto_guidance_and_perturbed_attention_teach():
    layers = LayerSkipConfig(indices=[0], fqn="transformer_blocks", dropout=1.0)
    attention = LayerSkipConfig(
        indices=[0], fqn="transformer_blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
    )
    pag = PerturbedAttentionGuidance(
        perturbed_guidance_config=attention, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0
    )
    for guider in (AutoGuidance(auto_guidance_config=layers), pag):
        _, states = recorded("pixart", guider)
        state, cond, uncond = states[-1]
        assert torch.isfinite(state.target).all()
        assert not torch.equal(state.target, uncond + 4.0 * (cond - uncond))


@pytest.mark.parametrize(
    ("guider", "error", "message"),
    [
        ("cfg", TypeError, "expected a guider of diffusers.guiders as the teacher, found str"),
        (agd.AdapterGuidance(), ValueError, "an adapter cannot teach itself"),
        (
            AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
            ValueError,
            "momentum=-0.5 adds up earlier steps, which an adapter does not see",
        ),
        (ScalesAFrequency(), ValueError, "has no single guidance_scale"),
    ],
    ids=["no guider", "adapter", "momentum", "several scales"],
)
def test_guiders_that_cannot_teach_are_refused(guider, error, message, tmp_path):
    with pytest.raises(error, match=message):
        require_teachable(guider)
    pipe = FAMILIES["sd3"].pipeline()
    with pytest.raises(error, match=message):
        agd.distill(pipe, prompts=["a fox"], teacher=guider, output_dir=tmp_path / "run")
    assert attachment_of(pipe) is None and not (tmp_path / "run").exists()


def test_name_of_a_guider_tells_settings_but_not_the_scale():
    assert name_of_guider(ClassifierFreeGuidance(3.0)) == name_of_guider(ClassifierFreeGuidance(5.0))
    assert name_of_guider(ClassifierFreeGuidance(guidance_rescale=0.5)) != name_of_guider(ClassifierFreeGuidance())


def test_scale_of_the_original_formulation_is_one_less():
    assert scale_for(ClassifierFreeGuidance(use_original_formulation=True), 4.0) == 3.0
    assert scale_for(ClassifierFreeGuidance(), 4.0) == 4.0


def test_distill_from_a_guider_records_it_and_what_it_gives_at_one(tmp_path):
    slg = SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    assert gives_cond_at_one(None) and gives_cond_at_one(ClassifierFreeGuidance()) and not gives_cond_at_one(slg)
    family = FAMILIES["pixart"]
    call = {key: value for key, value in family.call.items() if key not in ("num_inference_steps", "output_type")}
    for name, guider in (("cfg", ClassifierFreeGuidance()), ("slg", slg)):
        agd.distill(
            family.pipeline(),
            inputs=family.inputs(2),
            call=call,
            teacher=guider,
            output_dir=tmp_path / name,
            trajectories=4,
            sampling_steps=3,
            train_config=agd.TrainConfig(steps=3, batch_size=4),
            validation=0,
            progress=False,
        )
        config = read_json(tmp_path / name / "adapter_config.json")
        assert config["about"]["teacher"].startswith(f"{name_of_guider(guider)} over ")
        assert config["adapter"]["identity_at_one"] is (name == "cfg")
