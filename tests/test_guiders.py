"""Guiders of diffusers as the teacher: the targets are what the guider makes of the denoiser, and nothing of it stays behind."""

import copy
import json

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
)
from torch import Tensor

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.guiders.teaching import gives_cond_at_one, name_of_guider, require_teachable
from agd_fast.pipelines import PipelineTeacher
from agd_fast.teacher import State
from conftest import assert_as_exact
from helpers_families import attach_trained, denoisers, exact_output, run, spec_for, watched
from tiny import FAMILIES

OMEGA, STEPS = 3.0, 4


def scores(fqn):
    return LayerSkipConfig([0], fqn=fqn, skip_attention=False, skip_attention_scores=True, skip_ff=False)


WHOLE_RUN = {
    "skip_layer": {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0},
    "perturbed": {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0},
}
GUIDERS = {
    "cfg": lambda fqn, **scale: ClassifierFreeGuidance(**scale),
    "cfg, rescaled": lambda fqn, **scale: ClassifierFreeGuidance(guidance_rescale=0.7, **scale),
    "cfg in half of the steps": lambda fqn, **scale: ClassifierFreeGuidance(start=0.25, stop=0.75, **scale),
    "cfg zero star": lambda fqn, **scale: ClassifierFreeZeroStarGuidance(**scale),
    "apg": lambda fqn, **scale: AdaptiveProjectedGuidance(eta=0.5, adaptive_projected_guidance_rescale=2.0, **scale),
    "apg, original": lambda fqn, **scale: AdaptiveProjectedGuidance(
        eta=0.0, adaptive_projected_guidance_rescale=2.0, use_original_formulation=True, **scale
    ),
    "tangential": lambda fqn, **scale: TangentialClassifierFreeGuidance(**scale),
    "skip layer": lambda fqn, **scale: SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig([0], fqn=fqn), **WHOLE_RUN["skip_layer"], **scale
    ),
    "perturbed attention": lambda fqn, **scale: PerturbedAttentionGuidance(
        perturbed_guidance_config=scores(fqn), **WHOLE_RUN["perturbed"], **scale
    ),
    "auto": lambda fqn, **scale: AutoGuidance(auto_guidance_config=LayerSkipConfig([0], fqn=fqn), **scale),
}
HOOKS = ("skip layer", "perturbed attention", "auto")
BLOCKS = {"dit": "transformer_blocks", "pixart": "transformer_blocks", "sdxl": "mid_block.attentions.0.transformer_blocks"}


def teacher_of(pipe, family, guider=None) -> PipelineTeacher:
    call = {name: value for name, value in family.call.items() if name != "num_inference_steps"}
    return PipelineTeacher.of(pipe, inputs=family.inputs(2), call=call, guider=guider)


def states_of(teacher, omega=OMEGA) -> list[State]:
    states: list[State] = []

    def visit(state: State) -> Tensor:
        states.append(state)
        return state.target

    rows = torch.arange(1 if teacher.spec.listed else 2)
    scale = torch.full((len(rows),), omega)
    teacher.run({"input": rows}, rows, scale, STEPS, visit, generator=torch.Generator())
    return states


def unconditional_of(pipe, family) -> dict[str, Tensor]:
    """The arguments of ∅ as the pipeline makes them, from its own doubled batch."""
    with watched(pipe) as found:
        run(pipe, family, **family.guided)
    (forward,), first = found.steps[0], spec_for(pipe).pipeline.conditional == "first"
    rows = slice(2, 4) if first else slice(2)
    arguments = {**forward.arguments, **forward.arguments.get("added_cond_kwargs", {})}
    return {name: value[rows] for name, value in arguments.items() if isinstance(value, Tensor) and value.shape[:1] == (4,)}


@torch.no_grad()
def by_hand(guider, denoiser, teacher, state, null, step) -> Tensor:
    """As the loop of Modular Diffusers runs a guider, on a denoiser that this library never touched."""
    spec, target = teacher.spec, None
    guider.set_state(step=step, num_inference_steps=STEPS, timestep=state.timestep)
    conditions = {name: (value, null.get(name.split(".")[-1], value)) for name, value in state.conditions.items()}
    batches = guider.prepare_inputs(conditions)
    for batch in batches:
        guider.prepare_models(denoiser)
        arguments: dict = {spec.sample: state.sample, spec.timestep: state.timestep, **state.constants}
        for name in conditions:
            outer, _, inner = name.partition(".")
            value = getattr(batch, name)
            arguments = {**arguments, outer: {**arguments.get(outer, {}), inner: value} if inner else value}
        batch.noise_pred = denoiser(**arguments, return_dict=False)[0][:, : teacher.guided_channels]
        guider.cleanup_models(denoiser)
    target = guider(batches)[0]
    return target


@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("attached", [False, True], ids=["bare", "attached"])
def test_the_target_is_what_the_guider_gives_when_it_is_run_by_hand(name, kind, attached):
    """With an adapter too, whose marked blocks are found by the hooks of a guider that skips layers."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    (denoiser,) = denoisers(pipe).values()
    untouched, null = copy.deepcopy(denoiser), unconditional_of(pipe, family)
    if attached:
        attach_trained(pipe)
    teacher = teacher_of(pipe, family, GUIDERS[kind](BLOCKS[name]))
    states = states_of(teacher)
    assert len(states) == STEPS
    guider = GUIDERS[kind](BLOCKS[name], guidance_scale=OMEGA - ("original" in kind))
    expected = [by_hand(guider, untouched, teacher, state, null, step) for step, state in enumerate(states)]
    assert all(map(torch.equal, [state.target for state in states], expected))
    plain = [state.target for state in states_of(teacher_of(pipe, family))]
    assert kind == "cfg" or not all(map(torch.equal, plain, expected))


STANDARD = ["auraflow", "cogvideox", "dit", "hidream", "ltx", "pixart", "sana", "sd15", "sd3", "sdxl", "wan", "zimage"]


@pytest.mark.parametrize("original", [False, True], ids=["native", "original"])
@pytest.mark.parametrize("name", STANDARD)
def test_cfg_as_a_guider_teaches_what_the_pipeline_itself_computes(name, original):
    """In both formulations: the original one's g is ω − 1."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    teacher = teacher_of(pipe, family)
    teacher.runs.ask_what_is_handed(0)
    with watched(pipe) as found:
        own = states_of(teacher)[0].target
    guided = states_of(teacher_of(pipe, family, ClassifierFreeGuidance(use_original_formulation=original)))[0].target
    (denoiser,) = denoisers(pipe).values()
    first = spec_for(pipe).pipeline.conditional == "first"
    halves = torch.cat([exact_output(denoiser, forward) for forward in found.steps[0]])[:, : teacher.guided_channels].chunk(2)
    cond, uncond = halves if first else reversed(halves)
    assert_as_exact(guided, own, uncond + OMEGA * (cond - uncond))


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_a_guider_are_gone_afterwards(kind):
    family = FAMILIES["dit"]
    pipe = family.pipeline()
    plain = run(pipe, family, **family.guided)
    attach_trained(pipe)
    one_pass = run(pipe, family, **family.guided)
    states_of(teacher_of(pipe, family, GUIDERS[kind]("transformer_blocks")))
    registries = [vars(module)["_diffusers_hook"] for module in pipe.transformer.modules() if "_diffusers_hook" in vars(module)]
    assert registries
    assert not any(registry.hooks for registry in registries)
    assert torch.equal(run(pipe, family, **family.guided), one_pass)
    assert torch.equal(run(agd.unload(pipe), family, **family.guided), plain)


def test_a_guider_that_fails_leaves_no_hook_and_no_scale():
    family = FAMILIES["dit"]
    pipe = family.pipeline()
    guider = GUIDERS["skip layer"]("transformer_blocks", guidance_scale=5.0)
    teacher = teacher_of(pipe, family, guider)

    def fail(module, args):
        raise RuntimeError("no memory")

    with pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="no memory"):
        states_of(teacher)
    registries = [vars(module)["_diffusers_hook"] for module in pipe.transformer.modules() if "_diffusers_hook" in vars(module)]
    assert not any(registry.hooks for registry in registries)
    assert guider.guidance_scale == 5.0


def test_a_guider_is_left_as_it_was_found():
    """It names the blocks "auto" until it meets a denoiser; a plan that holds its settings must not change by that."""
    family, guider = FAMILIES["dit"], GUIDERS["skip layer"]("auto", guidance_scale=5.0)
    teacher = teacher_of(family.pipeline(), family, guider)
    before = teacher.guidance_name, dict(guider.config)
    states_of(teacher)
    assert (teacher.guidance_name, dict(guider.config)) == before
    assert guider.guidance_scale == 5.0
    assert "fqn='auto'" in teacher.guidance_name


def test_the_second_denoiser_of_wan_goes_on_counting_steps():
    """CFG-Zero* gives zero in the first step of a run, which the second denoiser never makes."""
    family = FAMILIES["wan22"]
    pipe, guider = family.pipeline(), ClassifierFreeZeroStarGuidance(zero_init_steps=1)
    call = {name: value for name, value in family.call.items() if name != "num_inference_steps"}
    zeros = {}
    for name in denoisers(pipe):
        teacher = PipelineTeacher.of(pipe, name, inputs=family.inputs(2), call=call, guider=guider)
        zeros[name] = [not state.target.any() for state in states_of(teacher)]
    assert sum(map(len, zeros.values())) == STEPS
    assert zeros["transformer"][0]
    assert not any(zeros["transformer"][1:] + zeros["transformer_2"])


def test_the_name_of_a_guider_holds_its_settings_but_the_scale():
    names = {name_of_guider(ClassifierFreeGuidance(guidance_scale=scale)) for scale in (2.0, 7.5)}
    assert len(names) == 1
    assert "ClassifierFreeGuidance(" in names.pop()
    others = {name_of_guider(make("transformer_blocks")) for make in GUIDERS.values()}
    assert len(others) == len(GUIDERS)
    assert not any("guidance_scale=7.5" in name for name in others)


@pytest.mark.parametrize("kind", GUIDERS)
def test_adapters_are_only_held_to_the_conditional_prediction_at_one_where_the_guider_is(kind):
    """Of the guiders that go to ε(c) as ω goes to 1, against the prediction near there."""
    family = FAMILIES["dit"]
    guider = GUIDERS[kind]("transformer_blocks")
    states = states_of(teacher_of(family.pipeline(), family, guider), omega=1 + 1e-4)
    off = [float((state.target - state.cond()).abs().max() / state.cond().abs().max()) for state in states]
    assert gives_cond_at_one(guider) == (max(off) < 1e-2)


def test_the_guiders_of_a_pipeline_are_held_to_the_same():
    family = FAMILIES["hunyuan_image"]
    pipe = family.pipeline()
    found = []
    for guider in (ClassifierFreeGuidance(), AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=None)):
        pipe.register_modules(ocr_guider=guider)
        teacher = teacher_of(pipe, family)
        found.append((teacher.gives_cond_at_one, teacher.guidance_name))
    assert [at_one for at_one, _ in found] == [True, False]
    assert len({name for _, name in found}) == 2
    pipe.register_modules(ocr_guider=AdaptiveProjectedMixGuidance())  # as published
    with pytest.raises(ValueError, match="MixGuidance with adaptive_projected_guidance_momentum=-0.5 adds up .* another guider"):
        teacher_of(pipe, family)


class ScaleAStep(BaseGuidance):
    """Has no one scale, as FrequencyDecoupledGuidance, which needs a package that is not here."""

    _input_predictions = ["pred_cond", "pred_uncond"]  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.guidance_scales = [10.0, 5.0]


@pytest.mark.parametrize(
    ("guider", "error", "message"),
    [
        (object(), TypeError, "expected a guider of diffusers.guiders as the teacher, found object"),
        (agd.AdapterGuidance(), ValueError, "an adapter cannot teach itself"),
        (
            AdaptiveProjectedGuidance(adaptive_projected_guidance_momentum=-0.5),
            ValueError,
            "adaptive_projected_guidance_momentum=-0.5 adds up earlier steps",
        ),
        (ScaleAStep(), ValueError, "ScaleAStep has no single guidance_scale"),
        (ClassifierFreeGuidance(enabled=False), ValueError, "ClassifierFreeGuidance is switched off, and guides by no scale"),
        (LTX2Guidance(stg_scale=1.0), ValueError, "LTX2Guidance guides x0 by passes that LTX-2's own blocks change"),
        (
            AutoGuidance(auto_guidance_layers=[0], dropout=0.1),
            ValueError,
            r"AutoGuidance drops a part of its layers at random \(dropout=0.1\)",
        ),
    ],
    ids=["no guider", "adapter", "momentum", "no scale", "off", "ltx2", "dropout"],
)
def test_what_cannot_teach_is_refused_before_anything_runs(guider, error, message, tmp_path):
    pipe = FAMILIES["dit"].pipeline()
    with pytest.raises(error, match=message):
        require_teachable(guider)
    with pytest.raises(error, match=message):
        agd.distill(pipe, output_dir=tmp_path / "run", inputs={"class_labels": [1, 2]}, teacher=guider)
    assert not (tmp_path / "run").exists()
    assert attachment_of(pipe) is None


def test_a_guider_needs_a_pipelines_own_runs(tmp_path):
    with pytest.raises(ValueError, match=r"teacher go\(es\) with a text pipeline of diffusers alone"):
        agd.distill(
            FAMILIES["dit"].pipeline(), output_dir=tmp_path / "run", class_labels=[1, 2], teacher=ClassifierFreeGuidance()
        )


@pytest.mark.parametrize("kind", ["cfg zero star", "skip layer"])
def test_distilling_a_guider_trains_and_is_recorded(kind, tmp_path):
    family = FAMILIES["dit"]
    pipe, guider = family.pipeline(), GUIDERS[kind]("auto")

    def distill():
        return agd.distill(
            pipe,
            output_dir=tmp_path,
            inputs=family.inputs(3),
            teacher=guider,
            guidance_range=(1.0, 6.0),
            trajectories=24,
            sampling_steps=STEPS,
            train_config=TrainConfig(steps=200, batch_size=16),
            validation=4,
            progress=False,
        )

    result = distill()
    assert result.explained.mean > 0.1
    assert not result.adapter.config.identity_at_one
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["about"]["teacher"].startswith(f"{type(guider).__name__}(")
    assert "DiTPipeline" in config["about"]["teacher"]
    assert config["about"]["teacher"] == json.loads((tmp_path / "trajectories" / "manifest.json").read_text())["plan"]["guidance"]
    log = (tmp_path / "log.jsonl").read_bytes()
    agd.unload(pipe)
    distill()  # continues, as nothing differs, and finds it done
    assert (tmp_path / "log.jsonl").read_bytes() == log
    assert torch.equal(run(pipe, family, **family.guided), run(agd.load(family.pipeline(), tmp_path), family, **family.guided))
