"""distill on pipelines: what they are trained on, what is recorded, how a run goes on, and what is refused."""

import json

import pytest
import torch

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.files import read_json
from agd_fast.trajectories import Trajectories
from helpers_distillation import after_calls, contents, kill_in_child, kill_self
from tiny import FAMILIES, sd15

PROMPTS = ["a red fox", "a boat", "two cats on a wall"]


def call_of(name):
    return {key: value for key, value in FAMILIES[name].call.items() if key not in ("num_inference_steps", "output_type")}


def short(pipe, directory, **changes):
    settings = {
        "prompts": PROMPTS,
        "call": call_of("sd15"),
        "output_dir": directory,
        "adapter": agd.AdapterConfig(hidden=2),
        "trajectories": 8,
        "sampling_steps": 3,
        "train_config": agd.TrainConfig(steps=6, batch_size=4, checkpoint_every=2, log_every=2),
        "validation": 0,
        "progress": False,
    }
    return agd.distill(pipe, **{**settings, **changes})


@pytest.fixture
def pipe():
    return FAMILIES["sd15"].pipeline()


def conditions_of(directory):
    return torch.cat([shard["condition/encoder_hidden_states"] for shard in Trajectories(directory / "trajectories").shards])


def test_prompts_may_be_a_list_or_a_file_and_are_cycled_through(pipe, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(["", *PROMPTS, " "]))
    short(pipe, tmp_path / "list")
    short(FAMILIES["sd15"].pipeline(), tmp_path / "file", prompts=tmp_path / "prompts.txt")
    found = conditions_of(tmp_path / "list")
    assert torch.equal(found, conditions_of(tmp_path / "file"))
    assert torch.equal(found[:3], found[3:6]) and not torch.equal(found[0], found[1])
    embedded, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
    assert torch.equal(found[:3], embedded)


def test_without_prompts_the_captions_that_ship_are_taken(pipe, tmp_path):
    short(pipe, tmp_path, prompts=None)
    embedded, _ = pipe.encode_prompt(agd.datasets.captions()[:8], "cpu", 1, False)
    assert torch.equal(conditions_of(tmp_path), embedded)
    assert attachment_of(pipe).adapter.config.guidance_range == (1.0, 6.0)  # as the adapter that was given says


def test_inputs_may_be_embeddings(pipe, tmp_path):
    embedded, null = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    short(pipe, tmp_path, prompts=None, inputs={"prompt_embeds": embedded, "negative_prompt_embeds": null})
    assert torch.equal(conditions_of(tmp_path)[:3], embedded)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompts": []}, ValueError, "at least one prompt, found none"),
        ({"prompts": "none.txt"}, FileNotFoundError, "found no file none.txt"),
        ({"inputs": {"prompt": ["a"]}}, ValueError, "expected prompts or inputs, found both"),
        ({"call": {"num_inference_steps": 3}}, ValueError, r"call holds \['num_inference_steps'\]"),
        ({"source": "data"}, ValueError, "source='data' goes with data="),
        ({"source": "student"}, ValueError, "expects init="),
        ({"prompts": None, "inputs": {"prompt": ["a"], "negative_prompt": []}}, ValueError, "inputs of one positive length"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(pipe, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        short(pipe, tmp_path / "run", **changes)
    assert attachment_of(pipe) is None and not is_wrapped(pipe)
    assert not (tmp_path / "run").exists()


def test_prompts_go_with_a_pipeline_alone(tmp_path):
    with pytest.raises(ValueError, match="prompts go.* with a text pipeline"):
        agd.distill(agd.datasets.digits_teacher(), prompts=["a fox"], output_dir=tmp_path)


def test_a_pipeline_whose_conditions_change_from_step_to_step_cannot_teach(tmp_path):
    family = sd15.SIBLINGS["controlnet"]
    pipe = family.pipeline()
    with pytest.raises(ValueError, match="down_block_additional_residuals.* changes from step to step, as a ControlNet's does"):
        short(pipe, tmp_path, prompts=None, inputs=family.inputs(2))
    assert attachment_of(pipe) is None and not is_wrapped(pipe)


def test_call_is_a_part_of_what_is_distilled(pipe, tmp_path):
    rescaled = {**call_of("sd15"), "guidance_rescale": 0.7, "negative_prompt": "blurry"}
    short(pipe, tmp_path, call=rescaled)
    config = read_json(tmp_path / "adapter_config.json")
    assert "guidance_rescale=0.7" in config["about"]["call"]
    assert config["adapter"]["negative_prompt"] == "blurry"
    with pytest.raises(ValueError, match="holds other trajectories .*guidance"):
        short(FAMILIES["sd15"].pipeline(), tmp_path)


def test_other_prompts_are_other_trajectories(pipe, tmp_path):
    short(pipe, tmp_path)
    with pytest.raises(ValueError, match=r"holds other trajectories \(conditions.prompt"):
        short(FAMILIES["sd15"].pipeline(), tmp_path, prompts=["a dog"])


def killed(directory):
    pipe = FAMILIES["sd15"].pipeline()
    after_calls(pipe.unet, 5, kill_self)  # in the second of two shards, the probe's forward among them
    short(pipe, directory)


def killed_in_training(directory):
    pipe = FAMILIES["sd15"].pipeline()
    after_calls(pipe.unet, 4, kill_self, training=True)
    short(pipe, directory, validate_every=1, validation=1)


def test_a_killed_run_goes_on_to_the_same_files(tmp_path):
    kill_in_child(killed, tmp_path / "collecting")
    assert len(read_json(tmp_path / "collecting" / "trajectories" / "manifest.json")["files"]) == 1
    kill_in_child(killed_in_training, tmp_path / "training")
    for name in ("collecting", "training"):
        short(FAMILIES["sd15"].pipeline(), tmp_path / name)
    short(FAMILIES["sd15"].pipeline(), tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for name in ("collecting", "training"):
        found = contents(tmp_path / name)
        for file in whole:
            if file.endswith(".safetensors") and not file.startswith("checkpoint"):
                assert found[file] == whole[file], (name, file)


def test_validating_measures_and_draws_and_changes_nothing_of_training(pipe, tmp_path):
    short(pipe, tmp_path / "watched", validation=2, validate_every=3)
    names = sorted(path.name for path in (tmp_path / "watched" / "validation").iterdir())
    assert names == [f"step-00000{step}.{end}" for step in (3, 6) for end in ("json", "png")]
    logged = [json.loads(line) for line in (tmp_path / "watched" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in logged if "guidance_explained" in entry] == [3, 6]
    short(FAMILIES["sd15"].pipeline(), tmp_path / "plain", validation=2)
    watched, plain = (contents(tmp_path / name)["adapter.safetensors"] for name in ("watched", "plain"))
    assert watched[-1000:] == plain[-1000:]  # the weights; before them is what identifies the run


@pytest.mark.parametrize("name", ["zimage", "qwenimage", "cogview4"])
def test_prompts_of_several_lengths_make_batches_of_one_shape(name, tmp_path):
    family = FAMILIES[name]
    inputs = {"prompt": ["a", "a much longer prompt than the other one", "a", "b"]}
    agd.distill(
        family.pipeline(),
        inputs=inputs,
        call=call_of(name),
        output_dir=tmp_path,
        adapter=agd.AdapterConfig(hidden=2),
        trajectories=4,
        shard_size=1,
        sampling_steps=2,
        train_config=agd.TrainConfig(steps=2, batch_size=8),
        validation=0,
        progress=False,
    )
    found = Trajectories(tmp_path / "trajectories")
    rows = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    batches = found.batches(rows)
    assert len(batches) > 1 and sum(map(len, batches)) == len(found)
    assert {float(omega) for batch in batches for omega in batch.omega} == {
        float(omega) for shard in found.shards for omega in shard["omega"]
    }
    with pytest.raises(ValueError, match="states of one shape"):
        found[rows]


def test_the_states_of_its_adapter_carry_the_pipelines_targets(pipe, tmp_path):
    short(pipe, tmp_path / "first", train_config=agd.TrainConfig(steps=40, batch_size=8))
    agd.unload(pipe)
    short(pipe, tmp_path / "second", adapter=None, init=tmp_path / "first", source="student")
    first, second = (Trajectories(tmp_path / name / "trajectories").shards[0] for name in ("first", "second"))
    assert torch.equal(first["omega"], second["omega"])
    start = first["step"] == 0
    assert torch.equal(first["sample"][start], second["sample"][start])
    assert torch.equal(first["target"][start], second["target"][start])
    assert not torch.equal(first["sample"][~start], second["sample"][~start])


def test_two_denoisers_need_trajectories_of_their_own(pipe, tmp_path):
    short(pipe, tmp_path)
    wan = FAMILIES["wan22"].pipeline()
    with pytest.raises(ValueError, match="a number of trajectories for a pipeline's 2 denoisers, found collected ones"):
        short(wan, tmp_path / "wan", call=call_of("wan22"), trajectories=Trajectories(tmp_path / "trajectories"))


def test_a_compiled_denoiser_is_recorded_as_a_plain_one(pipe, tmp_path):
    short(pipe, tmp_path / "plain")
    compiled = FAMILIES["sd15"].pipeline()
    compiled.unet = torch.compile(compiled.unet, backend="eager")
    short(compiled, tmp_path / "compiled")
    plain, found = (Trajectories(tmp_path / name / "trajectories").shards[0] for name in ("plain", "compiled"))
    assert plain.keys() == found.keys()
    assert torch.equal(plain["sample"], found["sample"]) and torch.equal(plain["target"], found["target"])
