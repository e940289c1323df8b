"""Runs with a pipeline as the teacher: several denoisers, stopped ones, validation and pictures."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.trajectories import Trajectories
from helpers_distillation import after_calls, assert_same_tensors, contents, kill_in_child, kill_self
from helpers_families import run, watched
from helpers_pipeline_teacher import SD15, SIZE, assert_untouched, distill_pipe, log_of, states_in
from tiny import FAMILIES
from tiny.text import prompts

# several denoisers


def test_a_failure_leaves_no_adapter_no_hook_and_no_wrapper(tmp_path):
    """Also of the first denoiser, when the second fails."""
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    plain = run(pipe, family, **family.guided)

    def fail():
        raise RuntimeError("no memory")

    with after_calls(pipe.transformer_2, 2, fail, training=True), pytest.raises(RuntimeError, match="no memory"):
        distill_pipe(pipe, tmp_path, family, sampling_steps=4)
    assert (tmp_path / "adapter.safetensors").is_file()
    assert not (tmp_path / "transformer_2" / "adapter.safetensors").exists()
    assert_untouched(pipe)
    assert torch.equal(run(pipe, family, **family.guided), plain)
    result = distill_pipe(pipe, tmp_path, family, sampling_steps=4)  # goes on
    assert list(result.others) == ["transformer_2"]


def test_each_denoiser_of_wan_gets_an_adapter_of_its_own_steps(tmp_path):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    result = distill_pipe(pipe, tmp_path, family, sampling_steps=4, validation=2)
    assert list(result.others) == ["transformer_2"]
    other = result.others["transformer_2"]
    assert attachment_of(pipe.transformer).adapter is result.adapter
    assert attachment_of(pipe.transformer_2).adapter is other.adapter
    assert other.output_dir == tmp_path / "transformer_2"
    boundary = 0.875 * 1000
    for folder, above in ((tmp_path, True), (tmp_path / "transformer_2", False)):
        times = torch.cat([states["timestep"] for states in states_in(folder)])
        assert len(times)
        assert ((times >= boundary) == above).all()
    assert set(result.explained.by_time).isdisjoint(other.explained.by_time)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path, other.output_dir)]
    assert [config["about"]["component"] for config in configs] == ["transformer", "transformer_2"]


def test_collected_trajectories_are_of_one_denoiser(tmp_path):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    distill_pipe(pipe, tmp_path / "first", family, sampling_steps=4)
    agd.unload(pipe)
    collected = Trajectories(tmp_path / "first" / "trajectories")
    with pytest.raises(ValueError, match=r"expected a number of trajectories for a pipeline's 2 denoisers, found collected"):
        distill_pipe(pipe, tmp_path / "second", family, trajectories=collected)
    assert_untouched(pipe)


def test_collected_trajectories_serve_another_run(pipe, tmp_path):
    first = distill_pipe(pipe, tmp_path / "first")
    agd.unload(pipe)
    collected = Trajectories(tmp_path / "first" / "trajectories")
    second = distill_pipe(pipe, tmp_path / "second", trajectories=collected)
    assert_same_tensors(second.adapter.state_dict(), first.adapter.state_dict())
    with pytest.raises(ValueError, match=r"do not fit this run \(.*guidance"):
        distill_pipe(SD15.pipeline(), tmp_path / "third", trajectories=collected, call={**SIZE, "guidance_rescale": 0.5})


# interrupted runs


def _killed(directory):
    """Collecting stops in the second shard."""
    pipe = SD15.pipeline()
    # a probe, two to see what the scheduler is handed, a shard of two steps, and the first step of the next
    with after_calls(pipe.unet, 1 + 2 + 2 + 1, kill_self):
        distill_pipe(pipe, directory)


def test_a_killed_run_continues_shard_by_shard_to_the_same_files(pipe, tmp_path):
    kill_in_child(_killed, tmp_path / "killed")
    shards = sorted(path.name for path in (tmp_path / "killed" / "trajectories").glob("*.safetensors"))
    assert shards == ["shard-00000.safetensors"]
    written = (tmp_path / "killed" / "trajectories" / shards[0]).stat().st_mtime_ns
    with watched(pipe) as found:
        distill_pipe(pipe, tmp_path / "killed")
    assert (tmp_path / "killed" / "trajectories" / shards[0]).stat().st_mtime_ns == written
    assert len(found.steps) == 2  # of the shard that was missing
    distill_pipe(SD15.pipeline(), tmp_path / "whole")
    assert contents(tmp_path / "killed" / "trajectories") == contents(tmp_path / "whole" / "trajectories")
    assert_same_tensors(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("killed", "whole")))


def test_a_run_on_other_prompts_is_another_run(pipe, tmp_path):
    distill_pipe(pipe, tmp_path, prompts=["red cat", "green house"])
    agd.unload(pipe)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds other trajectories \(conditions.*prompt"):
        distill_pipe(pipe, tmp_path, prompts=["red cat", "green ship"])
    assert contents(tmp_path) == before
    assert_untouched(pipe)
    distill_pipe(pipe, tmp_path, prompts=["red cat", "green house"])


def test_validation_on_the_way_is_written_logged_and_changes_nothing(pipe, tmp_path):
    settings = {"train_config": TrainConfig(steps=6, batch_size=4, log_every=2, checkpoint_every=2), "validation": 2}
    result = distill_pipe(pipe, tmp_path / "with", validate_every=3, **settings)
    distill_pipe(SD15.pipeline(), tmp_path / "without", **settings)
    found = sorted(path.name for path in (tmp_path / "with" / "validation").iterdir())
    assert found == ["step-000003.json", "step-000003.png", "step-000006.json", "step-000006.png"]
    logged = {entry["step"]: entry["guidance_explained"] for entry in log_of(tmp_path / "with") if "guidance_explained" in entry}
    assert list(logged) == [3, 6]
    for step, explained in logged.items():
        entry = json.loads((tmp_path / "with" / "validation" / f"step-{step:06d}.json").read_text())
        assert (entry["step"], entry["mean"]) == (step, explained)
        assert set(entry["by_scale"]) == {"1.5", "2", "3", "4", "6"}
    assert logged[6] == result.explained.mean
    assert_same_tensors(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("with", "without")))
    assert [entry for entry in log_of(tmp_path / "with") if "loss" in entry] == log_of(tmp_path / "without")


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_run_that_goes_on_is_the_same_bit_for_bit_with_its_validation(stop, tmp_path):
    """It stops before, between and after validations: no random number depends on where."""
    settings = {"train_config": TrainConfig(steps=8, batch_size=4, log_every=2, checkpoint_every=2), "validation": 2}
    settings["validate_every"] = 3
    pipe = SD15.pipeline()

    def fail():
        raise RuntimeError("stopped")

    with after_calls(pipe.unet, stop, fail, training=True), pytest.raises(RuntimeError, match="stopped"):
        distill_pipe(pipe, tmp_path / "stopped", **settings)
    assert_untouched(pipe)
    distill_pipe(pipe, tmp_path / "stopped", **settings)
    distill_pipe(SD15.pipeline(), tmp_path / "whole", **settings)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    same = ("adapter.safetensors", "samples.png")
    for name in (*same, *(f"validation/step-{step:06d}.{kind}" for step in (3, 6) for kind in ("json", "png"))):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# pictures


def test_samples_show_the_pipeline_unguided_with_cfg_and_with_the_adapter(pipe, tmp_path):
    config = TrainConfig(steps=8, batch_size=4, learning_rate=0.1)
    distill_pipe(pipe, tmp_path, validation=1, inputs=SD15.inputs(2), train_config=config)
    arms = {}
    for arm, one, scale in (("unguided", SD15.pipeline(), 1.0), ("cfg", SD15.pipeline(), 3.5), ("agd", pipe, 3.5)):
        images = []
        for row, prompt in enumerate(prompts(2)):
            generator = torch.Generator().manual_seed(1 + row)
            with torch.no_grad():
                images += one(prompt, **SIZE, num_inference_steps=2, guidance_scale=scale, generator=generator).images
        arms[arm] = [image.tobytes() for image in images]
    assert len({one[0] for one in arms.values()}) == 3
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (2 * SIZE["width"], 3 * SIZE["height"])
        corners = [(x * SIZE["width"], y * SIZE["height"]) for y in range(3) for x in range(2)]
        tiles = [image.crop((x, y, x + SIZE["width"], y + SIZE["height"])).tobytes() for x, y in corners]
    assert tiles == [tile for arm in arms.values() for tile in arm]


def test_pictures_are_drawn_of_a_pipeline_that_gives_arrays_unless_it_is_asked(tmp_path):
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    distill_pipe(pipe, tmp_path, family, validation=1, inputs=family.inputs(1))
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (32, 3 * 32)
