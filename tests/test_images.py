"""Pipelines that are given images beside a prompt: what is recorded of them, one forward a step, and pictures as rows.

And those that take one prompt a call, as they are recorded in the same way.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import agd_fast as agd
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.passes import first_few
from agd_fast.distillation.preview import preview
from agd_fast.pipelines import PipelineTeacher
from agd_fast.pipelines.handed import find_handed, numbered, shape_of
from agd_fast.pipelines.inputs import described
from agd_fast.pipelines.record import Recorder
from agd_fast.trajectories import collect
from helpers_distillation import contents
from helpers_families import denoisers, spec_for, watched
from helpers_pipeline_teacher import assert_untouched, distill_pipe, states_in
from test_families import RULES, standard
from tiny import FAMILIES, joyimage, ltx, sd15, single
from tiny.images import SIBLINGS, beside, images, latent_upscale
from tiny.text import prompts

PARTS = {  # of the denoiser's output, where the scheduler is not handed all of it
    "ltx_i2v": ((4, 8), (0, 8)),  # without the tokens of the first frame
    "kandinsky21": ((0, 4), (0, 8), (0, 8)),  # without the learned sigma
    "kandinsky21_inpaint": ((0, 4), (0, 8), (0, 8)),
    "kandinsky5_i2v": ((1, 6), (0, 4), (0, 4), (0, 4)),  # without the first frame
    "qwenimage_edit": ((0, 16), (0, 16)),  # without the tokens of one picture
    "qwenimage_edit_plus": ((0, 16), (0, 16)),  # without those of two
}
SIGNS = {"ltx_condition": -1, "zimage_img2img": -1}


@torch.no_grad()
def call(pipe, family, row=0, **arguments):
    """One row, as a user passes it."""
    inputs = {n: v[row : row + 1] if isinstance(v, torch.Tensor) else v[row] for n, v in family.inputs(row + 1).items()}
    if getattr(pipe, "guider", None) is not None and not hasattr(type(pipe), "_agd_pipeline"):
        pipe.guider.guidance_scale = arguments.pop("guidance_scale")
    torch.manual_seed(row)  # of which JoyImage Edit draws the latents of its picture
    generator = torch.Generator().manual_seed(row)
    seeded = {"generator": [generator] if spec_for(pipe).pipeline.batched else generator}
    return torch.as_tensor(pipe(**{**inputs, **family.call, **seeded, **arguments})[0])


def teacher_of(pipe, family, component=None, count=1):
    decided = {name: value for name, value in family.call.items() if name != "num_inference_steps"}
    return PipelineTeacher.of(pipe, component, inputs=family.inputs(count), call=decided)


def scale_of(family):
    return next(iter(family.guided.values()))


def followed(teacher, family):
    """Every state of a run of the first row, with what the pipeline's own target and ε(c) were then."""
    found = []

    def visit(state):
        found.append((state, state.target.clone(), state.cond()))
        return state.target

    row, omega = torch.tensor([0]), torch.tensor([scale_of(family) + family.omega_offset])
    teacher.run({"input": row}, row, omega, family.call["num_inference_steps"], visit, generator=torch.Generator())
    return found


@pytest.mark.parametrize("name", [*SIBLINGS, *single.SIBLINGS])
def test_a_pipeline_is_recorded_as_it_guides_and_makes_one_forward_a_step(name):
    family = {**SIBLINGS, **single.SIBLINGS}[name]
    pipe = family.pipeline()
    spec, rule = spec_for(pipe), RULES.get(name.split("_")[0], standard)
    with watched(pipe) as own:
        plain = call(pipe, family, **family.guided)
    for component in denoisers(pipe):
        teacher = teacher_of(pipe, family, component)
        (handed,) = teacher.runs.ask_what_is_handed(0).values()
        assert handed.sign == SIGNS.get(name, 1)
        assert handed.part == PARTS.get(name, tuple((0, size) for size in handed.shape))
        assert (teacher.guided_channels or 0) <= handed.shape[0]
        inside = (slice(None), *(slice(*ends) for ends in handed.part))
        with watched(pipe) as recorded:
            states = followed(teacher, family)
        assert all(map(torch.equal, recorded.handed, own.handed))  # being recorded changes nothing of a run
        steps = [step for step in own.steps if step[0].component == component]
        assert len(states) == len(steps) > 0
        for (_, target, cond), step in zip(states, steps, strict=True):
            halves = torch.cat([forward.output for forward in step]).chunk(2)
            expected, uncond = (half[inside] for half in (halves if spec.pipeline.conditional == "first" else reversed(halves)))
            assert torch.allclose(cond, expected, atol=1e-5)  # of one sample, where the pipeline's was of two
            assert torch.equal(target, rule(expected, uncond, scale_of(family)))
    agd.unload(pipe)
    unguided = call(pipe, family, **family.off)
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    with watched(pipe) as one_pass:
        assert torch.equal(call(pipe, family, **family.guided), unguided)
    assert [[forward.size for forward in step] for step in one_pass.steps] == [[1]] * len(own.steps)
    with agd.disabled(pipe):
        assert torch.equal(call(pipe, family, **family.guided), plain)
    assert not torch.equal(plain, unguided)


# which part of its output a pipeline hands to its scheduler


def test_what_is_handed_is_found_by_numbers():
    output = numbered((torch.zeros(2, 3, 4),))[0]
    assert output.shape == (2, 3, 4)
    assert shape_of({"sample": output}) == shape_of([output[0]]) == (3, 4)
    assert [one.tolist() for one in numbered([torch.zeros(2, 1)] * 2)] == [[[1.0], [2.0]]] * 2
    found = find_handed(-output[:1, 1:].transpose(1, 2) * (1 + 1e-9), (3, 4))
    assert (found.sign, found.part) == (-1, ((1, 3), (0, 4)))
    assert not found.is_leading(None)
    prediction = torch.randn(5, 2, 4)
    handed = -prediction.transpose(1, 2)
    assert torch.equal(found.prediction(handed), prediction)
    assert torch.equal(found.handed(prediction, torch.empty(5, 4, 2, dtype=torch.float64)), handed.double())
    assert find_handed(output[:1, :2], (3, 4)).is_leading(2)
    assert find_handed(output[:1], (3, 4)).is_leading(None)
    whole = output[:1]
    for other in (0.999 * whole, 2 * whole, whole + 1, whole[:, [0, 0]], whole[:, [0, 2]], torch.full((1, 3, 4), 0.3)):
        assert find_handed(other, (3, 4)) is None


def test_a_pipeline_that_hands_on_something_else_is_refused():
    pipe = latent_upscale()
    teacher = PipelineTeacher.of(pipe, inputs=images(1, 8))
    with pytest.raises(
        ValueError, match="StableDiffusionLatentUpscalePipeline hands its scheduler something else than its unet's"
    ):
        teacher.runs.ask_what_is_handed(0)


def test_several_tensors_a_sample_are_refused():
    pipe = FAMILIES["zimage"].pipeline()
    recorder = Recorder(pipe, pipe.transformer, spec_for(pipe), 1, lambda step: step.guided, {})
    with pytest.raises(ValueError, match="ZImagePipeline passes its denoiser several tensors a sample"):
        recorder._halves({"x": [[torch.zeros(4, 1, 8, 8)] * 2], "t": torch.zeros(1)})


def test_a_prediction_of_another_shape_than_its_target_is_an_error():
    with pytest.raises(ValueError, match=r"of the target's shape \(2, 1, 4\), found \(2, 3, 4\)"):
        distillation_loss(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4), torch.ones(2), "l2", "uniform")


def test_an_image_to_video_pipeline_is_distilled_and_shares_its_adapter_with_text_to_video(tmp_path):
    family = SIBLINGS["ltx_i2v"]
    text = ltx.pipeline()
    pipe = beside(type(family.pipeline()), text)
    changes = {
        "trajectories": 6,
        "sampling_steps": 3,
        "shard_size": None,
        "validation": 1,
        "adapter": agd.AdapterConfig(hidden=4),
    }
    config = TrainConfig(steps=60, batch_size=8, learning_rate=1e-2)
    result = distill_pipe(pipe, tmp_path, family, train_config=config, **changes)
    assert result.explained.mean > 0.3  # measured: .70
    assert len(result.explained.by_time) == 3  # by the t of what is noisy
    tokens = {(tuple(state["sample"].shape[1:]), tuple(state["target"].shape[1:])) for state in states_in(tmp_path)}
    assert tokens == {((8, 8), (4, 8))}  # the given frame is an input alone
    found = call(pipe, family, **family.guided)
    other = agd.load(family.pipeline(), tmp_path)
    assert torch.equal(call(other, family, **family.guided), found)
    agd.optimize(other)
    assert torch.allclose(call(other, family, **family.guided), found, atol=1e-5)
    agd.unload(text)
    shared = agd.share(agd.load(text, tmp_path), pipe)
    assert torch.equal(call(shared, family, **family.guided), found)


def test_what_is_drawn_of_torchs_own_generator_is_the_same_every_time():
    """The latents of the picture that JoyImage Edit edits."""
    family = SIBLINGS["joyimage_edit"]
    teacher = teacher_of(family.pipeline(), family)
    first, again, other = (teacher.runs.generate([0], "cfg", 3.0, 2, [seed])[0].tobytes() for seed in (5, 5, 6))
    assert first == again != other
    before = torch.get_rng_state()
    states, repeated = followed(teacher, family), followed(teacher, family)
    assert all(torch.equal(one[1], two[1]) for one, two in zip(states, repeated, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


# an entry a sample


@pytest.mark.parametrize("name", ["joyimage_plus", "joyimage_edit_plus"])
def test_sizes_of_every_sample_go_with_any_batch(name, tmp_path):
    """Of JoyImage Edit Plus, in batches of more than a run's samples."""
    family = {**FAMILIES, **SIBLINGS}[name]
    states = collected(tmp_path, family)
    batch = states[torch.arange(2).repeat(3)]
    (sizes,) = batch.constants["shape_list"]
    assert len(sizes) == (1 if name == "joyimage_plus" else 3)  # the new picture's, and those of two to edit
    pipe = family.pipeline()
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    teacher, arguments = teacher_of(pipe, family), {**batch.conditions, **batch.constants}
    with torch.no_grad():
        found = teacher.predict_agd(batch.sample, batch.timestep, arguments, batch.omega)
    assert torch.allclose(found[:2], found[4:], atol=1e-6)
    inputs = {"hidden_states": batch.sample, "timestep": batch.timestep, **arguments}
    assert agd.estimate_memory(pipe, inputs=inputs, modes=["off"]).row("off").total > 0
    size = {"height": joyimage.SIZE, "width": joyimage.SIZE}
    assert agd.estimate_memory(pipe, batch_size=5, modes=["off"], call=size).row("off").total > 0
    two = first_few({**arguments, "hidden_states": batch.sample, "shape_list": [sizes] * len(batch.sample)}, teacher.spec, 2)
    assert (len(two["hidden_states"]), two["shape_list"]) == (2, [sizes] * 2)


def test_samples_of_other_sizes_are_not_recorded_together():
    family = FAMILIES["joyimage_plus"]
    pipe = family.pipeline()
    recorder = Recorder(pipe, pipe.transformer, spec_for(pipe), 2, lambda step: step.guided, {})
    sizes = [[(1, 2, 2)], [(1, 2, 4)]]
    with pytest.raises(ValueError, match=r"shape_list differs from sample to sample, .*; expected one sample a run"):
        recorder._halves({"hidden_states": torch.zeros(2, 8, 4, 1, 2, 2), "timestep": torch.zeros(2), "shape_list": sizes})


# pictures as rows


def test_pictures_are_told_apart_by_what_they_show():
    one, same, other = sd15.image(0), sd15.image(0), sd15.image(1)
    assert described([one]) == described([same]) != described([other])
    assert described(np.asarray(one)) == described(np.asarray(same)) != described(np.asarray(other))
    assert described(one).startswith("RGB 16x16 ")
    assert described(one) != described(Image.frombytes("RGB", (8, 32), one.tobytes()))
    for plain in (["a", None, 1], ("a",), (1, 2.0), {"a": [True]}, "text", 0.5):
        assert described(plain) == repr(plain)


def collected(directory, family, call=None, **changes):
    decided = {name: value for name, value in family.call.items() if name != "num_inference_steps"}
    teacher = PipelineTeacher.of(family.pipeline(), inputs=changes.pop("inputs", family.inputs(3)), call=call or decided)
    settings = {"trajectories": 2, "steps": 2, "shard_size": teacher.run_size, "progress": False}
    return collect(teacher, teacher.conditions(), directory, **{**settings, **changes})


def test_states_are_collected_on_with_the_same_pictures_alone(tmp_path):
    family = SIBLINGS["sdxl_img2img"]
    collected(tmp_path, family)
    before = contents(tmp_path)
    assert len([name for name in before if name.endswith(".safetensors")]) == 2  # one at a time, as few pipelines take several
    collected(tmp_path, family)
    assert contents(tmp_path) == before
    others = {**family.inputs(3), "image": images(4)["image"][1:]}
    with pytest.raises(ValueError, match="holds other trajectories .*conditions.image"):
        collected(tmp_path, family, inputs=others)


def test_a_picture_in_the_call_is_recorded_by_its_hash(tmp_path):
    family = SIBLINGS["wan_ti2v"]
    call = {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}
    picture = images(1, 32)["image"][0]
    settings = {"prompts": prompts(2), "train_config": TrainConfig(steps=1, batch_size=1)}
    for _ in range(2):  # goes on
        distill_pipe(family.pipeline(), tmp_path, family, call={**call, "image": picture}, **settings)
    about = json.loads((tmp_path / "adapter_config.json").read_text())["about"]
    assert f"image={described(picture)}" in about["call"]


def test_pictures_of_several_sizes_are_each_recorded_as_they_are(tmp_path):
    family = SIBLINGS["sdxl_img2img"]
    wide = {"prompt": prompts(2), "image": [sd15.image(0), sd15.image(1).resize((32, 16))]}
    train_config = TrainConfig(steps=1, batch_size=4)
    distill_pipe(family.pipeline(), tmp_path, family, inputs=wide, trajectories=2, shard_size=1, train_config=train_config)
    shapes = [tuple(state["target"].shape[1:]) for state in states_in(tmp_path)]
    assert shapes == [(4, 8, 8), (4, 8, 16)]


def test_pictures_of_an_ip_adapter_are_rows_too(tmp_path):
    family = sd15.SIBLINGS["ip_adapter"]
    rows = {"prompt": prompts(2), "ip_adapter_image": [sd15.image(0), sd15.image(1)]}
    distill_pipe(family.pipeline(), tmp_path, family, inputs=rows, shard_size=1)
    embeddings = [state["condition/added_cond_kwargs.image_embeds.0"] for state in states_in(tmp_path)]
    assert not torch.equal(embeddings[0], embeddings[1])


def test_as_many_states_are_kept_where_a_pipeline_leaves_out_steps(tmp_path):
    states = collected(tmp_path, SIBLINGS["sdxl_img2img"], call={"strength": 0.4}, trajectories=4, keep=2, steps=8)
    assert len(states) == 8
    assert max(int(shard["step"].max()) for shard in states.shards) == 2  # of 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "wan_ti2v",
            r"WanImageToVideoPipeline needs image beside prompt; expected inputs=\{'prompt': \[...\], 'image': \[...\]\}",
        ),
        (
            "ltx_i2v",
            r"LTXImageToVideoPipeline: .*; if it needs image: expected inputs=\{'prompt': .*, 'image': \[...\]\}, one a prompt$",
        ),
    ],
)
def test_a_missing_picture_is_said_before_anything_runs(name, message, tmp_path):
    pipe = SIBLINGS[name].pipeline()
    with pytest.raises(ValueError, match=message):
        agd.distill(pipe, prompts=prompts(2), output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert_untouched(pipe)


def test_a_pipeline_whose_output_is_no_pictures_runs_once_for_its_preview():
    """The prior of Stable Cascade makes embeddings."""
    family = FAMILIES["stable_cascade_prior"]
    pipe = family.pipeline()
    agd.attach(pipe, agd.AdapterConfig(hidden=2))
    teacher = teacher_of(pipe, family, count=3)
    with watched(pipe) as found:
        assert preview(teacher, {}, 3.0, 2, 0) is None
    assert len(found.steps) == 2
