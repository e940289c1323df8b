"""Pipelines that take one prompt a call where they guide: distilled one by one, and what an adapter makes of them."""

from dataclasses import replace

import pytest
import torch

import agd_fast as agd
from agd_fast.distillation import TrainConfig
from agd_fast.engine import engine_of
from helpers_families import attach_trained, watched
from helpers_pipeline_teacher import distill_pipe, states_in, teacher_of
from test_images import call
from tiny import images
from tiny.single import SIBLINGS
from tiny.text import prompts


@pytest.mark.parametrize("name", [*SIBLINGS, "chronoedit"])  # whose call takes one picture, for all prompts
def test_what_takes_one_prompt_is_distilled_and_runs_on_the_engine(name, tmp_path):
    family = {**SIBLINGS, **images.SIBLINGS}[name]
    pipe = family.pipeline()
    changes = {"trajectories": 8, "sampling_steps": 3, "shard_size": None, "adapter": agd.AdapterConfig(hidden=4)}
    config = TrainConfig(steps=60, batch_size=8, learning_rate=1e-2)
    result = distill_pipe(pipe, tmp_path, family, train_config=config, validation=4, **changes)
    assert result.explained.mean > 0.1
    assert [len(state["sample"]) for state in states_in(tmp_path)] == [3] * 8  # the steps of one run
    with watched(pipe) as found:
        plain = call(pipe, family, **family.guided)
    assert [[forward.size for forward in step] for step in found.steps] == [[1]] * len(found.steps)
    other = agd.load(family.pipeline(), tmp_path)
    assert torch.equal(call(other, family, **family.guided), plain)
    agd.optimize(other)
    for _ in range(2):
        assert torch.allclose(call(other, family, **family.guided), plain, atol=1e-4)
    assert (engine_of(other.transformer).info()["captured"], engine_of(other.transformer).info()["plain_because"]) == (1, [])


def test_prx_takes_several_prompts_and_scales_with_an_adapter():
    family = SIBLINGS["prx"]
    pipe = family.pipeline()
    attach_trained(pipe)

    def latents(rows, scale):
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return pipe([prompts(2)[row] for row in rows], **family.call, guidance_scale=scale, generator=generators)[0]

    with watched(pipe) as found:
        both = latents((0, 1), [1.5, 4.0])
    assert [[forward.size for forward in step] for step in found.steps] == [[2]] * 4
    alone = torch.cat([latents((0,), 1.5), latents((1,), 4.0)])
    assert torch.allclose(both, alone, atol=1e-4)
    assert not torch.allclose(both[0], latents((0,), 4.0)[0], atol=1e-2)


@pytest.mark.parametrize(("name", "argument"), [("wan_vace", "conditioning_scale"), ("prx", "timesteps")])
def test_lists_of_a_call_are_passed_as_they_are(name, argument):
    family, given = SIBLINGS[name], {argument: [1.0, 0.5]}
    runs = teacher_of(family.pipeline(), family).runs
    arguments = replace(runs, call={**runs.call, **given})._arguments([1], 4.0, 2, [0])
    assert arguments.items() >= given.items()
    assert arguments["prompt"] == prompts(2)[1] and isinstance(arguments["generator"], torch.Generator)


def test_a_list_is_one_row_of_its_argument():
    family = SIBLINGS["wan_vace"]
    inputs = {**family.inputs(1), "conditioning_scale": [[1.0, 0.5]]}
    runs = replace(teacher_of(family.pipeline(), family).runs, inputs=inputs)
    assert runs._arguments([0], 4.0, 2, [0])["conditioning_scale"] == [1.0, 0.5]


@pytest.mark.parametrize("name", SIBLINGS)
def test_more_than_one_prompt_a_run_is_refused(name):
    teacher = teacher_of(SIBLINGS[name].pipeline(), SIBLINGS[name])
    assert teacher.run_size == 1
    with pytest.raises(ValueError, match="takes one prompt a call; expected batches of 1, found 2"):
        teacher.runs.generate([0, 1], "cfg", 3.0, 2, [0, 1])
