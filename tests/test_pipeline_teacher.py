"""A pipeline of diffusers as the teacher: what it is distilled on, and what it refuses."""

import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    DDIMScheduler,
    StableAudio3AudioToAudioPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.datasets import captions
from agd_fast.distillation import TrainConfig
from agd_fast.pipelines import PipelineTeacher
from agd_fast.pipelines.inputs import require_arguments
from helpers_distillation import assert_same_tensors, contents
from helpers_pipeline_teacher import SD15, SIZE, assert_untouched, distill_pipe, plan_of, states_in, teacher_of
from tiny import FAMILIES, cosmos, kandinsky2, sd15, stable_cascade
from tiny.text import prompts

# what a pipeline is distilled on


def test_prompts_are_a_list_or_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red cat\n\n  green house \nblue tree\n", encoding="utf-8")
    for name, given in (("list", ["red cat", "green house", "blue tree"]), ("file", file), ("name", str(file))):
        distill_pipe(SD15.pipeline(), tmp_path / name, prompts=given)
    for name in ("file", "name"):
        assert contents(tmp_path / name / "trajectories") == contents(tmp_path / "list" / "trajectories")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere.txt", FileNotFoundError, "a text file with one prompt a line, .*; found no file nowhere.txt"),
        ("a red cat", FileNotFoundError, "in Python a list of prompts; found no file a red cat"),
        ([], ValueError, "expected at least one prompt, found none"),
        (["", "  "], ValueError, "expected at least one prompt, found none"),
        (["a cat", 2], ValueError, "expected prompts as texts, found 2"),
    ],
)
def test_missing_prompts_are_said_before_anything_runs(pipe, given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        distill_pipe(pipe, tmp_path / "run", prompts=given)
    assert not (tmp_path / "run").exists()
    assert_untouched(pipe)


def test_a_file_of_prompts_that_is_no_text_is_named(pipe, tmp_path):
    (file := tmp_path / "prompts.txt").write_bytes(b"\xff\xfe a cat")
    with pytest.raises(ValueError, match=f"{file} is not a text in UTF-8"):
        distill_pipe(pipe, tmp_path / "run", prompts=file)


@pytest.mark.parametrize("given", [{"call": {**SIZE, "heigth": 16}}, {"inputs": {"prompt": ["a"], "heigth": [16]}}])
def test_arguments_that_the_call_does_not_take_are_refused(pipe, given, tmp_path):
    """Though Stable Diffusion 1.5 takes any by **kwargs."""
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no argument heigth; expected .*, the nearest are height, "):
        distill_pipe(pipe, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    assert_untouched(pipe)


def test_a_call_that_passes_all_on_takes_any_argument():
    class Pipe:
        def __call__(self, *args, prompt=None, **kwargs): ...

    require_arguments(Pipe(), {"prompt": ["a"], "height": 16}, Pipe)


def test_a_users_own_call_may_pass_arguments_on():
    class Own(StableDiffusionPipeline):
        def __call__(self, prompt=None, guidance_scale=7.5, **kwargs):
            return super().__call__(prompt, guidance_scale=guidance_scale, **kwargs)

    pipe = Own(**sd15.components())
    own, plain = (PipelineTeacher.of(one, inputs={"prompt": prompts(1)}, call=SIZE) for one in (pipe, SD15.pipeline()))
    assert own.sample_shape == plain.sample_shape == (4, 8, 8)


def test_a_bare_call_takes_the_captions_that_ship(pipe, tmp_path):
    settings = {"trajectories": 1, "sampling_steps": 1, "train_config": TrainConfig(steps=1, batch_size=1), "validation": 0}
    agd.distill(pipe, output_dir=tmp_path, progress=False, call=SIZE, preset="small", adapter={"hidden": 2}, **settings)
    assert agd.info(pipe)["adapter"]["hidden"] == 2
    teacher = PipelineTeacher.of(SD15.pipeline(), inputs={"prompt": captions()}, call=SIZE)
    assert len(teacher) > 400
    assert plan_of(tmp_path)["conditions"] == teacher.fingerprints(teacher.conditions())
    assert plan_of(tmp_path)["guidance_range"] == [1.0, 12.0]


def test_targets_are_of_scales_by_which_the_pipeline_guides(tmp_path):
    """Cosmos 2.5 guides above ω = 2 alone."""
    family = FAMILIES["cosmos"]
    result = distill_pipe(family.pipeline(), tmp_path / "left open", family, guidance_range=None, validation=1)
    assert list(result.explained.by_scale) == [3.0, 4.0, 6.0]
    assert plan_of(tmp_path / "left open")["guidance_range"] == [2.0, 6.0]
    ranges = {"own": {"guidance_range": (0.5, 5.0)}, "config": {"guidance_range": None}}
    for name, settings in ranges.items():
        adapter = agd.AdapterConfig(hidden=2, **({"guidance_range": (1.5, 6.0)} if name == "config" else {}))
        with pytest.raises(ValueError, match=r"above 1 \(ω = 2\) alone; expected .*, found 0.5 to 5 \(ω from 1.5 to 6\)"):
            distill_pipe(family.pipeline(), tmp_path / name, family, adapter=adapter, **settings)
        assert contents(tmp_path / name).keys() <= {".lock"}


def test_prompt_embeddings_give_the_same_states_as_their_prompts(pipe, tmp_path):
    given = prompts(2)
    embeddings, _ = pipe.encode_prompt(given, "cpu", 1, False)
    distill_pipe(SD15.pipeline(), tmp_path / "prompts", prompts=given)
    distill_pipe(pipe, tmp_path / "embeddings", inputs={"prompt_embeds": embeddings})
    for found, expected in zip(states_in(tmp_path / "embeddings"), states_in(tmp_path / "prompts"), strict=True):
        assert_same_tensors(found, expected)
    assert list(plan_of(tmp_path / "embeddings")["conditions"]) == ["prompt_embeds"]


def test_embeddings_of_several_lengths_are_a_list_even_of_one_prompt():
    family = FAMILIES["zimage"]
    pipe = family.pipeline()
    embeddings, negative = (
        pipe.encode_prompt(texts, device="cpu", do_classifier_free_guidance=False, max_sequence_length=32)[0]
        for texts in (["a red cat", "a house"], ["", ""])
    )
    inputs = {"prompt_embeds": embeddings, "negative_prompt_embeds": negative}
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    assert PipelineTeacher.of(pipe, inputs=inputs, call=call).sample_shape == teacher_of(pipe, family).sample_shape


def test_weights_that_hooks_hide_are_refused(pipe, tmp_path):
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="the weights of this pipeline's unet lie in accelerate's hooks"):
        distill_pipe(pipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_further_arguments_of_the_call_are_used_and_recorded(pipe, tmp_path):
    given = {**SIZE, "guidance_rescale": 0.7, "negative_prompt": "pale lamp"}
    result = distill_pipe(pipe, tmp_path / "run", call=given)
    distill_pipe(SD15.pipeline(), tmp_path / "plain", call=SIZE)
    described = "guidance_rescale=0.7, height=16, negative_prompt='pale lamp', width=16"
    assert described in plan_of(tmp_path / "run")["guidance"]
    about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())["about"]
    assert about["call"] == described
    assert about["teacher"] == plan_of(tmp_path / "run")["guidance"]
    assert (about["pipeline"], about["component"]) == ("StableDiffusionPipeline", "unet")
    assert result.adapter.config.negative_prompt == "pale lamp"
    found, plain = (states_in(tmp_path / name)[0] for name in ("run", "plain"))
    assert torch.equal(found["sample"][:2], plain["sample"][:2])  # the same noise
    assert not torch.equal(found["target"][:2], plain["target"][:2])


@pytest.mark.parametrize("name", ["guidance_scale", "num_inference_steps", "generator", "prompt", "num_images_per_prompt"])
def test_arguments_that_distilling_decides_are_refused(pipe, name, tmp_path):
    with pytest.raises(ValueError, match=rf"call holds \['{name}'\], which distilling decides"):
        distill_pipe(pipe, tmp_path, call={**SIZE, name: 3})
    assert_untouched(pipe)


def test_one_sample_a_prompt_may_be_asked_for(pipe, tmp_path):
    distill_pipe(pipe, tmp_path, call={**SIZE, "num_images_per_prompt": 1})
    distill_pipe(SD15.pipeline(), tmp_path, call=SIZE)  # the same plan: it continues


def test_a_class_pipeline_is_distilled_on_all_labels_but_the_null_one(tmp_path):
    family = FAMILIES["dit"]
    settings = {"trajectories": 4, "sampling_steps": 2, "train_config": TrainConfig(steps=2, batch_size=2), "validation": 0}
    settings |= {"progress": False, "adapter": agd.AdapterConfig(hidden=2)}
    agd.distill(family.pipeline(), output_dir=tmp_path, **settings)
    agd.distill(family.pipeline(), output_dir=tmp_path, class_labels=range(1000), **settings)  # the same plan: it continues
    for others in (range(999), [0]):
        with pytest.raises(ValueError, match=r"holds other trajectories \(conditions"):
            agd.distill(family.pipeline(), output_dir=tmp_path, class_labels=others, **settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["a"], "inputs": {"prompt": ["a"]}}, "expected prompts or inputs, found both"),
        ({"inputs": {"prompt": ["a", "b"], "negative_prompt": ["c"]}}, r"inputs of one positive length, found .*2.*1"),
        ({"inputs": {}}, "inputs of one positive length, found none"),
    ],
)
def test_inputs_that_do_not_go_together_are_refused(pipe, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        distill_pipe(pipe, tmp_path, **changes)
    assert_untouched(pipe)


@pytest.mark.parametrize("name", ["prompts", "inputs", "call", "teacher"])
def test_what_goes_with_a_pipeline_is_refused_beside_a_teacher(name, tmp_path):
    pipe = SD15.pipeline()
    null = {"encoder_hidden_states": torch.zeros(1, 16, 16)}
    teacher = agd.Teacher(pipe.unet, DDIMScheduler(), null_condition=null)
    given = {"prompts": ["a"], "inputs": {"prompt": ["a"]}, "call": SIZE, "teacher": object()}[name]
    with pytest.raises(ValueError, match=rf"{name} go\(es\) with a text pipeline of diffusers alone.*found Teacher"):
        agd.distill(teacher, output_dir=tmp_path, conditions={"encoder_hidden_states": torch.zeros(2, 16, 16)}, **{name: given})


def test_a_pipeline_is_not_followed_on_noised_data(pipe, tmp_path):
    data = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a pipeline's own runs are followed; expected agd_fast.Teacher"):
        distill_pipe(pipe, tmp_path, source="data", data=data)
    assert_untouched(pipe)


# what cannot be followed


def test_conditions_that_change_from_step_to_step_are_refused(tmp_path):
    family = sd15.SIBLINGS["controlnet"]
    pipe = family.pipeline()
    with pytest.raises(ValueError, match=r"'down_block_additional_residuals.0' changes from step to step, as a ControlNet's"):
        distill_pipe(pipe, tmp_path, inputs=family.inputs(2))
    assert_untouched(pipe)


def test_predictions_that_are_combined_behind_the_scheduler_are_refused():
    pipe = cosmos.first_cosmos()
    size = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16}
    teacher = PipelineTeacher.of(pipe, inputs={"prompt": prompts(1)}, call=size)
    message = "CosmosTextToWorldPipeline hands its scheduler the conditional and the unconditional prediction before it combines"
    with pytest.raises(ValueError, match=message):
        teacher.runs.follow([0], 4.0, 2, [0], lambda step: step.guided)
    assert_untouched(pipe)


def test_pipelines_without_a_guidance_scale_are_refused(tmp_path):
    pipe = stable_cascade.decoder()
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    agd.save(pipe, tmp_path / "adapter")
    combined = stable_cascade.combined()
    message = "a call of StableCascadeCombinedPipeline takes no guidance_scale; expected its prior_pipe or decoder_pipe"
    for use in (
        agd.attach,
        lambda combined: agd.load(combined, tmp_path / "adapter"),
        lambda combined: distill_pipe(combined, tmp_path / "run", inputs={"prompt": prompts(2)}, call=SIZE),
    ):
        with pytest.raises(ValueError, match=message):
            use(combined)
    assert attachment_of(combined.decoder) is None and not (tmp_path / "run").exists()
    pipe = FAMILIES["stable_audio3"].pipeline()
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    other = StableAudio3AudioToAudioPipeline(**pipe.components)
    with pytest.raises(ValueError, match="StableAudio3AudioToAudioPipeline takes no guidance_scale; expected a pipeline that"):
        agd.share(pipe, other)
    assert not is_wrapped(other)


def test_pipelines_whose_denoiser_is_an_inner_ones_are_refused():
    pipe = kandinsky2.combined()
    message = "KandinskyV22CombinedPipeline runs other pipelines in its call; expected its prior_pipe or decoder_pipe"
    agd.attach(pipe.decoder_pipe, agd.AdapterConfig(hidden=2))
    for use in (
        lambda: PipelineTeacher.of(pipe, inputs={"prompt": prompts(1)}, call=SIZE),
        lambda: agd.share(pipe.decoder_pipe, pipe),
        lambda: agd.attach(pipe, agd.AdapterConfig(hidden=2)),
    ):
        with pytest.raises(ValueError, match=message):
            use()
    assert not hasattr(pipe.decoder_pipe, "_progress_bar_config") and not is_wrapped(pipe)


def test_a_pipeline_that_merely_holds_another_is_not_one_of_these(pipe):
    pipe.img2img = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    agd.share(agd.attach(pipe) and pipe, pipe.img2img)
    assert is_wrapped(pipe) and is_wrapped(pipe.img2img)


def test_an_error_of_a_pipeline_that_keeps_no_setting_of_progress_bars_is_its_own(pipe, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "set_progress_bar_config", lambda self, **settings: None)
    vars(pipe).pop("_progress_bar_config", None)
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs` has to be in"):
        PipelineTeacher.of(pipe, inputs={"prompt": prompts(1)}, call={"callback_on_step_end_tensor_inputs": ["noise"]})


def test_more_than_two_branches_are_refused(tmp_path):
    family = FAMILIES["sd3"]
    pipe = family.pipeline()
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline guides by 3 branches; expected two"):
        distill_pipe(pipe, tmp_path, family, call={**call, **layers}, sampling_steps=4)
    assert_untouched(pipe)
