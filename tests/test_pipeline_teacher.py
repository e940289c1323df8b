"""A pipeline of diffusers as the teacher: what it is distilled on, what is stored of its runs, and what it refuses."""

import json
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.datasets import captions
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.loss import distillation_loss
from agd_fast.pipelines import PipelineTeacher
from agd_fast.spec import nest
from agd_fast.trajectories import Trajectories, collect
from agd_fast.trajectories.manifest import Manifest, Plan
from conftest import assert_as_exact
from helpers_distillation import after_calls, assert_same_tensors, contents, kill_in_child, kill_self
from helpers_families import Forward, attach_trained, denoisers, exact_output, run, watched
from tiny import FAMILIES, sd15
from tiny.text import prompts

SD15 = FAMILIES["sd15"]
SIZE = {"height": 16, "width": 16}


@pytest.fixture
def pipe():
    return SD15.pipeline()


def distill(pipe, directory, family=SD15, **changes):
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    settings = {
        "call": call,
        "guidance_range": (1.0, 6.0),
        "adapter": agd.AdapterConfig(hidden=2),
        "trajectories": 4,
        "sampling_steps": 2,
        "shard_size": 2,
        "train_config": TrainConfig(steps=4, batch_size=4, log_every=2, checkpoint_every=2),
        "validation": 0,
        "progress": False,
    }
    if "prompts" not in changes and "inputs" not in changes:
        changes["inputs"] = family.inputs(3)
    return agd.distill(pipe, output_dir=directory, **{**settings, **changes})


def teacher_of(pipe, family, cls=PipelineTeacher, count=2, **call):
    call = {name: value for name, value in {**family.call, **call}.items() if name != "num_inference_steps"}
    return cls.of(pipe, inputs=family.inputs(count), call=call)


def states_in(directory) -> list[dict[str, Tensor]]:
    return [load_file(path) for path in sorted((directory / "trajectories").glob("*.safetensors"))]


def plan_of(directory):
    return json.loads((directory / "trajectories" / "manifest.json").read_text())["plan"]


def log_of(directory):
    """Its entries without what the clock tells."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "samples_per_second"} for entry in entries]


def assert_untouched(pipe):
    assert not is_wrapped(pipe)
    assert all(attachment_of(denoiser) is None for denoiser in denoisers(pipe).values())
    assert "step" not in vars(pipe.scheduler)
    assert not any(denoiser._forward_pre_hooks for denoiser in denoisers(pipe).values())


# what a pipeline is distilled on


def test_prompts_are_a_list_or_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("red cat\n\n  green house \nblue tree\n", encoding="utf-8")
    for name, given in (("list", ["red cat", "green house", "blue tree"]), ("file", file), ("name", str(file))):
        distill(SD15.pipeline(), tmp_path / name, prompts=given)
    for name in ("file", "name"):
        assert contents(tmp_path / name / "trajectories") == contents(tmp_path / "list" / "trajectories")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("nowhere.txt", FileNotFoundError, "a text file with one a line, found no file nowhere.txt"),
        ([], ValueError, "expected at least one prompt, found none"),
        (["", "  "], ValueError, "expected at least one prompt, found none"),
    ],
)
def test_missing_prompts_are_said_before_anything_runs(pipe, given, error, message, tmp_path):
    with pytest.raises(error, match=message):
        distill(pipe, tmp_path / "run", prompts=given)
    assert not (tmp_path / "run").exists()
    assert_untouched(pipe)


def test_a_bare_call_takes_the_captions_that_ship(pipe, tmp_path):
    settings = {"trajectories": 1, "sampling_steps": 1, "train_config": TrainConfig(steps=1, batch_size=1), "validation": 0}
    agd.distill(pipe, output_dir=tmp_path, progress=False, call=SIZE, **settings)
    teacher = PipelineTeacher.of(SD15.pipeline(), inputs={"prompt": captions()}, call=SIZE)
    assert len(teacher) > 400
    assert plan_of(tmp_path)["conditions"] == teacher.fingerprints(teacher.conditions())
    assert plan_of(tmp_path)["guidance_range"] == [1.0, 12.0]


def test_prompt_embeddings_give_the_same_states_as_their_prompts(pipe, tmp_path):
    given = prompts(2)
    embeddings, _ = pipe.encode_prompt(given, "cpu", 1, False)
    distill(SD15.pipeline(), tmp_path / "prompts", prompts=given)
    distill(pipe, tmp_path / "embeddings", inputs={"prompt_embeds": embeddings})
    for found, expected in zip(states_in(tmp_path / "embeddings"), states_in(tmp_path / "prompts"), strict=True):
        assert_same_tensors(found, expected)
    assert list(plan_of(tmp_path / "embeddings")["conditions"]) == ["prompt_embeds"]


def test_further_arguments_of_the_call_are_used_and_recorded(pipe, tmp_path):
    given = {**SIZE, "guidance_rescale": 0.7, "negative_prompt": "pale lamp"}
    result = distill(pipe, tmp_path / "run", call=given)
    distill(SD15.pipeline(), tmp_path / "plain", call=SIZE)
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


@pytest.mark.parametrize("name", ["guidance_scale", "num_inference_steps", "generator", "prompt"])
def test_arguments_that_distilling_decides_are_refused(pipe, name, tmp_path):
    with pytest.raises(ValueError, match=rf"call holds \['{name}'\], which distilling decides"):
        distill(pipe, tmp_path, call={**SIZE, name: 3})
    assert_untouched(pipe)


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
        distill(pipe, tmp_path, **changes)
    assert_untouched(pipe)


@pytest.mark.parametrize("name", ["prompts", "inputs", "call", "teacher"])
def test_what_goes_with_a_pipeline_is_refused_beside_a_teacher(name, tmp_path):
    pipe = SD15.pipeline()
    null = {"encoder_hidden_states": torch.zeros(1, 16, 16)}
    teacher = agd.Teacher(pipe.unet, DDIMScheduler(), null_condition=null)
    given = {"prompts": ["a"], "inputs": {"prompt": ["a"]}, "call": SIZE, "teacher": object()}[name]
    with pytest.raises(ValueError, match=rf"{name} go\(es\) with a text pipeline of diffusers alone.*found Teacher"):
        agd.distill(teacher, output_dir=tmp_path, conditions={"encoder_hidden_states": torch.zeros(2, 16, 16)}, **{name: given})


# what is stored


class Noting(PipelineTeacher):
    """Keeps the conditional predictions of the states that it visits."""

    def run(self, conditions, start, omega, steps, visit, **options):
        self.seen = []

        def noted(state):
            self.seen.append(state.cond())
            return visit(state)

        super().run(conditions, start, omega, steps, noted, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_stored_is_all_that_the_denoiser_needs(name, tmp_path):
    """Rotary embeddings, masks, positions and sizes too: from the files, a zero adapter predicts what the pipeline saw."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    teacher = teacher_of(pipe, family, Noting)
    count = 1 if teacher.spec.listed else 2
    settings = {"guidance_range": (2.0, 5.0), "steps": 3, "shard_size": count, "progress": False}
    states = collect(teacher, teacher.conditions(), tmp_path, trajectories=count, **settings)
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    states = Trajectories(states.manifest.directory)
    assert len(teacher.seen) * count == len(states)
    for step, expected in enumerate(teacher.seen):
        batch = states[torch.arange(step * count, (step + 1) * count)]
        with torch.no_grad():
            found = teacher.predict_agd(batch.sample, batch.timestep, {**batch.conditions, **batch.constants}, batch.omega)
        assert torch.equal(found, expected)
        assert not torch.equal(batch.target, expected)


@pytest.mark.parametrize(
    ("name", "constants"),
    [
        ("cogvideox", {"image_rotary_emb.0", "image_rotary_emb.1"}),
        ("chroma", {"img_ids", "txt_ids"}),
        ("ltx", {"num_frames", "height", "width", "rope_interpolation_scale"}),
        ("qwenimage", {"img_shapes"}),
        ("kandinsky5", {"visual_rope_pos.0", "text_rope_pos", "scale_factor"}),
    ],
)
def test_constants_come_back(name, constants, tmp_path):
    family = FAMILIES[name]
    pipe = family.pipeline()
    with watched(pipe) as found:
        run(pipe, family, **family.off)
    teacher = teacher_of(pipe, family)
    states = collect(teacher, teacher.conditions(), tmp_path, trajectories=2, steps=2, shard_size=2, progress=False)
    batch = Trajectories(states.manifest.directory)[torch.arange(2)]
    assert constants <= batch.constants.keys()
    passed = found.steps[0][0].arguments
    for path, value in nest({name: batch.constants[name] for name in batch.constants}).items():
        assert_equal(value, passed[path])


def assert_equal(found, expected):
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    else:
        assert found == expected


RAGGED = {
    "zimage": ["red cat", "blue ship", "red cat", "red cat"],
    "qwenimage": ["red cat", "blue ship", "red cat", "red cat"],
    "cogview4": ["red cat", "a golden house behind a tree and a ship", "red cat", "red cat"],
}


@pytest.mark.parametrize("name", RAGGED)
def test_prompts_of_several_lengths_make_batches_by_shape_and_one_mean_over_all_states(name, tmp_path):
    family = FAMILIES[name]
    pipe = family.pipeline()
    batch_size = 8
    distill(
        pipe,
        tmp_path,
        family,
        inputs={"prompt": RAGGED[name]},
        shard_size=1,
        guidance_range=(2.0 - family.omega_offset, 5.0 - family.omega_offset),
        train_config=TrainConfig(steps=1, batch_size=batch_size, log_every=1, weighting="uniform"),
    )
    states = Trajectories(tmp_path / "trajectories")
    assert len(states) == batch_size
    batches = states.batches(torch.arange(batch_size))
    assert sorted(map(len, batches)) == [2, 6]
    with pytest.raises(ValueError, match=r"expected states of one shape, found 2"):
        states[torch.arange(batch_size)]
    targets = torch.cat([shard["target"] for shard in states.shards])
    stored = {tuple(target.flatten().tolist()) for target in targets}
    assert {tuple(target.flatten().tolist()) for batch in batches for target in batch.target} == stored
    agd.unload(pipe)
    teacher = teacher_of(pipe, family)
    plain, exact = [], []
    for batch in batches:
        for row in range(len(batch)):
            one = {n: value[row : row + 1] for n, value in batch.conditions.items()}
            arguments = nest({**one, **batch.constants})
            x, t = batch.sample[row : row + 1], batch.timestep[row : row + 1]
            listed = {n: list(value) for n, value in {**arguments, teacher.spec.sample: x}.items() if n in teacher.spec.listed}
            arguments = {**arguments, teacher.spec.sample: x, teacher.spec.timestep: t, **listed, "return_dict": False}
            output = exact_output(teacher.denoiser, Forward("", arguments, x, 1))
            target, omega = batch.target[row : row + 1], batch.omega[row : row + 1]
            with torch.no_grad():
                prediction = teacher.predict(x, t, {**one, **batch.constants})
            plain.append(distillation_loss(prediction, target, omega, "l2", "uniform"))
            exact.append(distillation_loss(output, target.double(), omega.double(), "l2", "uniform"))
    logged = torch.tensor(log_of(tmp_path)[0]["loss"])
    assert_as_exact(logged, torch.stack(plain).mean(), torch.stack(exact).mean())
    starts = [0, len(batches[0]), batch_size]
    means = torch.stack([torch.stack(exact[a:b]).mean() for a, b in pairwise(starts)]).mean()
    assert not torch.isclose(means, torch.stack(exact).mean())  # the mean of each batch's mean is another


def test_samples_of_several_lengths_ask_for_one_a_run(tmp_path):
    family = FAMILIES["zimage"]
    pipe = family.pipeline()
    with pytest.raises(ValueError, match=r"cap_feats holds tensors of several shapes.*one sample a run \(shard_size=1\)"):
        distill(pipe, tmp_path, family, inputs={"prompt": RAGGED["zimage"]}, shard_size=2)
    assert_untouched(pipe)
    assert teacher_of(pipe, family).run_size == 1


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_compiled_denoiser_records_the_same(how, tmp_path):
    plain, compiled = SD15.pipeline(), SD15.pipeline()
    if how == "module":
        compiled.unet = torch.compile(compiled.unet, backend="eager")
    else:
        compiled.unet.compile(backend="eager")
    for name, pipe in (("plain", plain), ("compiled", compiled)):
        teacher = teacher_of(pipe, SD15)
        collect(teacher, teacher.conditions(), tmp_path / name, trajectories=2, steps=2, shard_size=2, progress=False)
    assert contents(tmp_path / "plain") == contents(tmp_path / "compiled")
    torch._dynamo.reset()


# the states that a student makes


def test_a_students_own_states_get_the_pipelines_targets(pipe, tmp_path):
    attach_trained(pipe, guidance_range=(1.0, 6.0))
    agd.save(pipe, tmp_path / "first")
    fresh = SD15.pipeline()
    changes = {"init": tmp_path / "first", "adapter": None, "guidance_range": None, "source": "student", "trajectories": 2}
    distill(fresh, tmp_path / "second", inputs=SD15.inputs(2), **changes)
    plan = Manifest.read(tmp_path / "second" / "trajectories").plan
    assert plan["source"] == "student"
    (stored,) = states_in(tmp_path / "second")
    generator = Plan(**{**plan, "steps": tuple(plan["steps"])}).shards[0].generator(1)
    torch.rand(1, generator=generator)  # ω
    seeds = torch.randint(2**31, (2,), generator=generator).tolist()
    arguments = {**SD15.inputs(2), **SIZE, "num_inference_steps": 2, "output_type": "latent"}
    scale = float(stored["omega"][0])
    with watched(pipe) as found, torch.no_grad():
        pipe(**arguments, guidance_scale=scale, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    seen = torch.cat([step[0].arguments["sample"] for step in found.steps])
    assert torch.equal(stored["sample"], seen)  # as it samples, one forward a step
    null, _ = pipe.encode_prompt("", "cpu", 1, False)
    teacher = agd.Teacher(SD15.pipeline().unet, pipe.scheduler, null_condition={"encoder_hidden_states": null})
    for rows in (slice(2), slice(2, 4)):
        conditions = {"encoder_hidden_states": stored["condition/encoder_hidden_states"][stored["condition"][rows]]}
        with torch.no_grad():
            target, _ = teacher.predict_cfg(stored["sample"][rows], stored["timestep"][rows], conditions, stored["omega"][rows])
        assert torch.equal(stored["target"][rows], target)


def test_a_pipeline_is_not_followed_on_noised_data(pipe, tmp_path):
    data = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"a pipeline's own runs are followed; expected agd_fast.Teacher"):
        distill(pipe, tmp_path, source="data", data=data)
    assert_untouched(pipe)


# what cannot be followed


def test_conditions_that_change_from_step_to_step_are_refused(tmp_path):
    family = sd15.SIBLINGS["controlnet"]
    pipe = family.pipeline()
    with pytest.raises(ValueError, match=r"'down_block_additional_residuals.0' changes from step to step, as a ControlNet's"):
        distill(pipe, tmp_path, inputs=family.inputs(2))
    assert_untouched(pipe)


def test_more_than_two_branches_are_refused(tmp_path):
    family = FAMILIES["sd3"]
    pipe = family.pipeline()
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    with pytest.raises(ValueError, match=r"StableDiffusion3Pipeline guides by 3 branches; expected two"):
        distill(pipe, tmp_path, family, call={**call, **layers}, sampling_steps=4)
    assert_untouched(pipe)


def test_a_failure_leaves_no_adapter_no_hook_and_no_wrapper(tmp_path):
    """Also of the first denoiser, when the second fails."""
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    plain = run(pipe, family, **family.guided)

    def fail():
        raise RuntimeError("no memory")

    with after_calls(pipe.transformer_2, 2, fail, training=True), pytest.raises(RuntimeError, match="no memory"):
        distill(pipe, tmp_path, family, sampling_steps=4)
    assert (tmp_path / "adapter.safetensors").is_file()
    assert not (tmp_path / "transformer_2" / "adapter.safetensors").exists()
    assert_untouched(pipe)
    assert torch.equal(run(pipe, family, **family.guided), plain)
    result = distill(pipe, tmp_path, family, sampling_steps=4)  # goes on
    assert list(result.others) == ["transformer_2"]


# several denoisers


def test_each_denoiser_of_wan_gets_an_adapter_of_its_own_steps(tmp_path):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    result = distill(pipe, tmp_path, family, sampling_steps=4, validation=2)
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
    distill(pipe, tmp_path / "first", family, sampling_steps=4)
    agd.unload(pipe)
    collected = Trajectories(tmp_path / "first" / "trajectories")
    with pytest.raises(ValueError, match=r"expected a number of trajectories for a pipeline's 2 denoisers, found collected"):
        distill(pipe, tmp_path / "second", family, trajectories=collected)
    assert_untouched(pipe)


def test_collected_trajectories_serve_another_run(pipe, tmp_path):
    first = distill(pipe, tmp_path / "first")
    agd.unload(pipe)
    collected = Trajectories(tmp_path / "first" / "trajectories")
    second = distill(pipe, tmp_path / "second", trajectories=collected)
    assert_same_tensors(second.adapter.state_dict(), first.adapter.state_dict())
    with pytest.raises(ValueError, match=r"do not fit this run \(.*guidance"):
        distill(SD15.pipeline(), tmp_path / "third", trajectories=collected, call={**SIZE, "guidance_rescale": 0.5})


# interrupted runs


def _killed(directory):
    """Collecting stops in the second shard."""
    pipe = SD15.pipeline()
    with after_calls(pipe.unet, 1 + 2 + 1, kill_self):  # a probe, a shard of two steps, and the first step of the next
        distill(pipe, directory)


def test_a_killed_run_continues_shard_by_shard_to_the_same_files(pipe, tmp_path):
    kill_in_child(_killed, tmp_path / "killed")
    shards = sorted(path.name for path in (tmp_path / "killed" / "trajectories").glob("*.safetensors"))
    assert shards == ["shard-00000.safetensors"]
    written = (tmp_path / "killed" / "trajectories" / shards[0]).stat().st_mtime_ns
    with watched(pipe) as found:
        distill(pipe, tmp_path / "killed")
    assert (tmp_path / "killed" / "trajectories" / shards[0]).stat().st_mtime_ns == written
    assert len(found.steps) == 2  # of the shard that was missing
    distill(SD15.pipeline(), tmp_path / "whole")
    assert contents(tmp_path / "killed" / "trajectories") == contents(tmp_path / "whole" / "trajectories")
    assert_same_tensors(*(load_file(tmp_path / name / "adapter.safetensors") for name in ("killed", "whole")))


def test_a_run_on_other_prompts_is_another_run(pipe, tmp_path):
    distill(pipe, tmp_path, prompts=["red cat", "green house"])
    agd.unload(pipe)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"holds other trajectories \(conditions.*prompt"):
        distill(pipe, tmp_path, prompts=["red cat", "green ship"])
    assert contents(tmp_path) == before
    assert_untouched(pipe)
    distill(pipe, tmp_path, prompts=["red cat", "green house"])


def test_validation_on_the_way_is_written_logged_and_changes_nothing(pipe, tmp_path):
    settings = {"train_config": TrainConfig(steps=6, batch_size=4, log_every=2, checkpoint_every=2), "validation": 2}
    result = distill(pipe, tmp_path / "with", validate_every=3, **settings)
    distill(SD15.pipeline(), tmp_path / "without", **settings)
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
        distill(pipe, tmp_path / "stopped", **settings)
    assert_untouched(pipe)
    distill(pipe, tmp_path / "stopped", **settings)
    distill(SD15.pipeline(), tmp_path / "whole", **settings)
    assert log_of(tmp_path / "stopped") == log_of(tmp_path / "whole")
    same = ("adapter.safetensors", "samples.png")
    for name in (*same, *(f"validation/step-{step:06d}.{kind}" for step in (3, 6) for kind in ("json", "png"))):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


# pictures


def test_samples_show_the_pipeline_unguided_with_cfg_and_with_the_adapter(pipe, tmp_path):
    config = TrainConfig(steps=8, batch_size=4, learning_rate=0.1)
    distill(pipe, tmp_path, validation=1, inputs=SD15.inputs(2), train_config=config)
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
    distill(pipe, tmp_path, family, validation=1, inputs=family.inputs(1))
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (32, 3 * 32)
