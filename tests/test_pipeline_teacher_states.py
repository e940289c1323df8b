"""What is stored of a pipeline's runs, its own and a student's."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import agd_fast as agd
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.loss import distillation_loss
from agd_fast.forward import nest
from agd_fast.pipelines import PipelineTeacher
from agd_fast.trajectories import Trajectories, collect
from agd_fast.trajectories.manifest import Manifest, Plan
from conftest import assert_as_exact
from helpers_distillation import contents
from helpers_families import Forward, attach_trained, exact_output, freeze, run, watched
from helpers_pipeline_teacher import SD15, SIZE, assert_untouched, distill_pipe, log_of, states_in, teacher_of
from tiny import FAMILIES

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
    freeze(pipe)
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
        ("audioldm", {"encoder_hidden_states"}),  # None, which its U-Net asks for
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
    distill_pipe(
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
        distill_pipe(pipe, tmp_path, family, inputs={"prompt": RAGGED["zimage"]}, shard_size=2)
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
    distill_pipe(fresh, tmp_path / "second", inputs=SD15.inputs(2), **changes)
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
