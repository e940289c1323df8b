"""Every family of denoisers through its real pipeline: one forward a step, an untouched base, and the right targets."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.negatives import other_negative
from agd_fast.families import SPECS
from agd_fast.forward import argument_of
from agd_fast.pipelines import PipelineTeacher
from agd_fast.sites import config_value
from agd_fast.teacher import State
from conftest import assert_as_exact
from helpers_families import attach_trained, denoisers, exact_output, freeze, run, spec_for, watched
from tiny import FAMILIES, animatediff, audioldm, images, sd15, single

CONFIG = agd.AdapterConfig(hidden=2)
# what these bases compute depends on how far a prompt is padded
WITH_PADDING = ("joyimage", "audioldm2", "kandinsky3", "kandinsky5", "longcat_audio")
# that may be given a negative prompt or none
NEGATIVES = [name for name, family in FAMILIES.items() if "prompt" in family.inputs(1) and "negative_prompt" not in family.guided]
NEGATIVES.remove("flux2")
SIBLINGS = {**sd15.SIBLINGS, **animatediff.SIBLINGS, **audioldm.SIBLINGS}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def pipe(family):
    return family.pipeline()


def scales(family, values) -> dict[str, Any]:
    """The family's own guidance with other scales."""
    return {name: values if isinstance(value, float) else value for name, value in family.guided.items()}


def omega_of(family) -> float:
    return next(value for value in family.guided.values() if isinstance(value, float)) + family.omega_offset


def test_every_denoiser_that_has_a_spec_has_a_tiny_pipeline():
    tried = [*FAMILIES.values(), *single.SIBLINGS.values(), images.SIBLINGS["chronoedit"]]
    classes = {type(denoiser).__name__ for family in tried for denoiser in denoisers(family.pipeline()).values()}
    assert classes == set(SPECS)
    assert len(classes) >= 12


def test_families_agree_with_their_specs_on_what_omega_is(family, pipe):
    spec = spec_for(pipe)
    assert spec.omega_offset == family.omega_offset
    assert family.off[spec.pipeline.omega_arguments[0]] == spec.pipeline.cfg_off_value


def test_an_adapter_halves_the_samples_that_pass_the_denoiser_a_step(family, pipe):
    with watched(pipe) as two_passes:
        run(pipe, family, **family.guided)
    attach_trained(pipe)
    with watched(pipe) as one_pass:
        run(pipe, family, **family.guided)
    assert len(one_pass.steps) == len(two_passes.steps) == family.call["num_inference_steps"]
    assert [sum(forward.size for forward in step) for step in two_passes.steps] == [4] * len(two_passes.steps)
    assert [[forward.size for forward in step] for step in one_pass.steps] == [[2]] * len(one_pass.steps)
    used = [[{forward.component for forward in step} for step in found.steps] for found in (one_pass, two_passes)]
    assert used[0] == used[1]


def test_a_zero_adapter_gives_the_conditional_prediction_bit_for_bit(family, pipe):
    unguided = run(pipe, family, **family.off)
    guided = run(pipe, family, **family.guided)
    agd.attach(pipe, CONFIG)
    assert torch.equal(run(pipe, family, **family.guided), unguided)
    assert not torch.equal(guided, unguided)


@pytest.mark.parametrize("name", NEGATIVES)
def test_an_empty_negative_prompt_is_known_where_it_is_what_the_pipeline_takes_for_none(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    given = {"rows": (0,), "num_inference_steps": 2, **family.guided}
    same = torch.equal(run(pipe, family, **given), run(pipe, family, **given, negative_prompt=""))
    agd.attach(pipe, CONFIG)
    assert (other_negative(pipe, {"negative_prompt": [""]}, attachment_of(pipe)) == "") == same


def test_an_adapter_that_is_disabled_or_unloaded_leaves_the_pipelines_own_guidance_bit_for_bit(family, pipe):
    plain = run(pipe, family, **family.guided)
    attach_trained(pipe)
    changed = run(pipe, family, **family.guided)
    with agd.disabled(pipe):
        disabled = run(pipe, family, **family.guided)
    agd.unload(pipe)
    assert torch.equal(disabled, plain)
    assert torch.equal(run(pipe, family, **family.guided), plain)
    assert not torch.equal(changed, plain)


def test_files_of_the_base_hold_no_adapter(family, pipe, tmp_path):
    plain = {name: dict(denoiser.state_dict()) for name, denoiser in denoisers(pipe).items()}
    attach_trained(pipe)
    for name, denoiser in denoisers(pipe).items():
        denoiser.save_pretrained(tmp_path / name)
        saved = load_file(tmp_path / name / "diffusion_pytorch_model.safetensors")
        assert saved.keys() <= plain[name].keys() == denoiser.state_dict().keys()
        assert all(torch.equal(tensor, plain[name][key]) for key, tensor in saved.items())
        again = type(denoiser).from_pretrained(tmp_path / name)
        assert attachment_of(again) is None
        assert again.state_dict().keys() == plain[name].keys()


def test_without_guidance_the_scheduler_gets_the_denoisers_output_or_it_with_its_sign_turned(family, pipe):
    spec = spec_for(pipe)
    with watched(pipe) as found:
        run(pipe, family, **family.off)
    for (forward,), handed in zip(found.steps, found.handed, strict=True):
        channels = config_value(denoisers(pipe)[forward.component], spec.guided_channels)
        prediction = family.sign * forward.output[:, :channels]
        if family.name == "unet3d":  # whose frames are handed as entries of the batch
            prediction = prediction.transpose(1, 2)
        assert torch.equal(prediction.reshape(handed.shape), handed)


def teacher_of(pipe, family, component=None, **call) -> PipelineTeacher:
    call = {name: value for name, value in {**family.call, **call}.items() if name != "num_inference_steps"}
    return PipelineTeacher.of(pipe, component, inputs=family.inputs(2), call=call)


def follow(teacher, visit, omega, steps=4) -> None:
    """A run of `rows_of` from the noise that `run` starts from."""
    rows = torch.tensor(rows_of(teacher.spec))
    scale = torch.full((len(rows),), omega)
    teacher.run({"input": rows}, rows, scale, steps, visit, generator=torch.Generator())


def rows_of(spec) -> tuple[int, ...]:
    return (0,) if spec.listed else (0, 1)  # prompts of several lengths are recorded one by one where they are a list


def test_the_recorded_conditional_call_is_the_one_that_the_pipeline_makes_without_guidance(family, pipe):
    freeze(pipe)
    with watched(pipe) as found:
        run(pipe, family, rows_of(spec_for(pipe)), **family.off)
    forwards = [step[0] for step in found.steps]
    first = next(iter(denoisers(pipe)))
    for name, denoiser in denoisers(pipe).items():
        predictions: list[Tensor] = []
        states: list[State] = []

        def visit(state: State, states: list[State] = states, predictions: list[Tensor] = predictions) -> Tensor:
            states.append(state)
            predictions.append(state.cond())
            return predictions[-1]  # follows the run without guidance

        teacher = teacher_of(pipe, family, name)
        follow(teacher, visit, omega_of(family))
        own = [forward for forward in forwards if forward.component == name]
        assert len(states) == len(own) > 0
        for state, forward in zip(states, own, strict=True):
            for condition in teacher.spec.adapted:
                passed = argument_of(condition.argument, (), (), forward.arguments)
                recorded = state.conditions[condition.argument]
                passed = torch.stack(passed) if isinstance(passed, list) else passed
                assert torch.equal(recorded.reshape(passed.shape), passed)
        channels = teacher.guided_channels
        if family.name == "stable_audio":  # its t is one for the batch, as rows it is rounded differently
            assert_as_exact(predictions[0], own[0].output, exact_output(denoiser, own[0]))
        elif name == first:  # a later denoiser starts from where the earlier ones, which were guided, have come to
            assert all(torch.equal(one, forward.output[:, :channels]) for one, forward in zip(predictions, own, strict=True))


def standard(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return uncond + scale * (cond - uncond)


def from_the_conditional(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return cond + scale * (cond - uncond)


def of_both_scaled(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return (scale + 1.0) * cond - scale * uncond


def by_lerp(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return torch.lerp(uncond, cond, scale)


def of_three_channels(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return torch.cat([standard(cond[:, :3], uncond[:, :3], scale), cond[:, 3:]], dim=1)


def of_four_channels(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    return torch.cat([standard(cond[:, :4], uncond[:, :4], scale), cond[:, 4:]], dim=1)


def to_the_conditionals_norm(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    guided = standard(cond, uncond, scale)
    return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


def to_the_conditionals_norm_by_channels(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    guided = standard(cond, uncond, scale)
    norms = [torch.norm(one, dim=2, keepdim=True) for one in (cond, guided)]
    return guided * (norms[0] / norms[1].clamp_min(1e-6))


def to_the_conditionals_norm_at_most(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    guided = standard(cond, uncond, scale)
    norms = [torch.norm(one, dim=-1, keepdim=True) for one in (cond, guided)]
    return guided * (norms[0] / (norms[1] + 1e-8)).clamp(max=1.0)


RULES = {
    "cosmos": from_the_conditional,
    "deepfloyd_if": of_three_channels,
    "joyimage": to_the_conditionals_norm_by_channels,
    "joyimage_plus": to_the_conditionals_norm_by_channels,
    "kandinsky22": of_four_channels,
    "kandinsky3": of_both_scaled,
    "krea2": from_the_conditional,
    "longcat_image": to_the_conditionals_norm_at_most,
    "lumina": of_three_channels,
    "lumina2": to_the_conditionals_norm,
    "nucleusmoe_image": to_the_conditionals_norm,
    "qwenimage": to_the_conditionals_norm,
    "stable_cascade_decoder": by_lerp,
    "stable_cascade_prior": by_lerp,
    "zimage": from_the_conditional,
}


def recorded_and_by_hand(pipe, family, name, rule, **call):
    """The targets of one denoiser, and what `rule` makes of the two halves that the pipeline computed; what it handed on."""
    teacher, spec = teacher_of(pipe, family, name, **call), spec_for(pipe)
    targets: list[Tensor] = []

    def visit(state: State) -> Tensor:
        targets.append(state.target.clone())
        return state.target

    teacher.runs.ask_what_is_handed(0)
    with watched(pipe) as found:
        follow(teacher, visit, omega_of(family))
    by_hand = []
    scale = omega_of(family) - family.omega_offset
    for step in found.steps:
        if step[0].component == name:
            halves = torch.cat([forward.output for forward in step])[:, : teacher.guided_channels].chunk(2)
            cond, uncond = halves if spec.pipeline.conditional == "first" else reversed(halves)
            by_hand.append(rule(cond, uncond, scale))
    return targets, by_hand, found.handed


def test_the_recorded_target_is_the_familys_combination_of_both_predictions(family, pipe):
    rule = RULES.get(family.name, standard)
    freeze(pipe)
    with watched(pipe) as plain:
        run(pipe, family, rows_of(spec_for(pipe)), **scales(family, omega_of(family) - family.omega_offset))
    for name in denoisers(pipe):
        targets, by_hand, handed = recorded_and_by_hand(pipe, family, name, rule)
        assert len(targets) == len(by_hand) > 0
        assert all(map(torch.equal, targets, by_hand))
        assert all(map(torch.equal, handed, plain.handed))  # being recorded changes nothing of a run


def test_sd15_rescales_the_target_where_the_call_says_so():
    family = FAMILIES["sd15"]

    def rescaled(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
        guided = standard(cond, uncond, scale)
        std = [one.std(dim=[1, 2, 3], keepdim=True) for one in (cond, guided)]
        return 0.7 * (guided * (std[0] / std[1])) + (1 - 0.7) * guided

    pipe = family.pipeline()
    targets, by_hand, _ = recorded_and_by_hand(pipe, family, "unet", rescaled, guidance_rescale=0.7)
    assert all(map(torch.equal, targets, by_hand))
    plain, _, _ = recorded_and_by_hand(pipe, family, "unet", standard)
    assert not torch.equal(targets[0], plain[0])


def test_scales_of_one_batch_are_each_samples_own(family, pipe):
    attach_trained(pipe)
    low, high = (run(pipe, family, **scales(family, scale)) for scale in (1.5, 4.0))
    with watched(pipe) as found:
        mixed = run(pipe, family, **scales(family, [1.5, 4.0]))
    assert not torch.equal(low[0], high[0])
    if family.name != "hidream":
        assert torch.equal(mixed, torch.stack([low[0], high[1]]))
        return
    omega = torch.tensor([1.5, 4.0])  # its experts get other numbers of tokens, and may round differently
    for (forward,) in found.steps:
        with torch.no_grad(), agd.guided(pipe.transformer, omega):
            plain = pipe.transformer(**forward.arguments)[0]
        assert_as_exact(forward.output, plain, exact_output(pipe.transformer, forward, omega.double()))


def test_a_sample_of_a_batch_is_predicted_as_it_is_alone(family, pipe):
    """Whatever its neighbour's ω is, and however long the neighbour's prompt. A batch of one may round differently: as much may
    be lost as beside itself."""
    attach_trained(pipe)
    rows = (2, 9) if family.name in WITH_PADDING else (0, 1)  # prompts of one length
    values = [1.5, 4.0]
    with watched(pipe) as together:
        run(pipe, family, rows, **scales(family, values))
    for row, scale in enumerate(values):
        with watched(pipe) as itself:
            run(pipe, family, (rows[row], rows[row]), **scales(family, scale))
        with watched(pipe) as alone:
            run(pipe, family, (rows[row],), **scales(family, scale))
        (forward,) = alone.steps[0]
        omega = torch.tensor([scale + family.omega_offset], dtype=torch.float64)
        reference = exact_output(denoisers(pipe)[forward.component], forward, omega)
        assert_as_exact(together.steps[0][0].output[row], itself.steps[0][0].output[0], reference[0])


def test_an_adapter_is_loaded_into_a_fresh_pipeline_and_gives_the_same(family, pipe, tmp_path):
    attach_trained(pipe)
    agd.save(pipe, tmp_path)
    names = list(denoisers(pipe))
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    folders = ["", *(f"{name}/" for name in names[1:])]
    assert files == {f"{folder}{file}" for folder in folders for file in ("adapter.safetensors", "adapter_config.json")}
    fresh = agd.load(family.pipeline(), tmp_path)
    assert torch.equal(run(fresh, family, **family.guided), run(pipe, family, **family.guided))


def test_an_adapter_of_another_family_is_refused_naming_both(family, pipe, tmp_path):
    agd.attach(pipe, CONFIG)
    agd.save(pipe, tmp_path)
    other = FAMILIES["sd15" if family.name == "dit" else "dit"].pipeline()
    here, there = (type(next(iter(denoisers(one).values()))).__name__ for one in (pipe, other))
    with pytest.raises(ValueError, match=f"an adapter for a {here}, expected one for this {there}"):
        agd.load(other, tmp_path)
    assert attachment_of(other) is None


def test_all_70_cross_attentions_of_sdxl_get_an_adapter():
    """Of the real size, without memory: its up-blocks have one attention more than layers_per_block."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            layers_per_block=2,
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684
    adapter = agd.attach(unet, agd.AdapterConfig("cross_attention", hidden=8))
    sites = [part.site.path for part in adapter.sites]
    assert sites == [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    assert len(sites) == 70


@pytest.mark.parametrize("name", SIBLINGS)
def test_pipelines_beside_others_make_one_forward_a_step_too(name):
    family = SIBLINGS[name]
    pipe = family.pipeline()
    unguided = run_sibling(pipe, family, **family.off)
    agd.attach(pipe, CONFIG)
    with watched(pipe) as found:
        output = run_sibling(pipe, family, **family.guided)
    assert torch.equal(output, unguided)
    assert [[forward.size for forward in step] for step in found.steps] == [[2]] * len(found.steps)


@torch.no_grad()
def run_sibling(pipe, family, **arguments) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return pipe(**{**family.inputs(2), **family.call, "generator": generators, **arguments})[0]
