"""guidance_explained is what its formula says."""

import itertools
import json

import pytest
import torch
from diffusers import HeunDiscreteScheduler

import agd_fast as agd
from agd_fast.evaluation.explained import guidance_explained
from helpers_distillation import (
    ddim,
    distill_tiny,
    short,
    tiny_teacher,
)


@pytest.mark.parametrize("scheduler", [ddim(), HeunDiscreteScheduler()])  # Heun's method visits a t twice
def test_guidance_explained_matches_the_formula(tmp_path, scheduler):
    teacher = tiny_teacher()
    teacher.scheduler = scheduler
    distill_tiny(tmp_path, teacher, train_config=short(steps=40))
    table = teacher.conditions([0, 1, 2])
    found = guidance_explained(teacher, table, scales=(2.0, 5.0), steps=3, seed=9, batch_size=2)
    errors = []
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(9))
    for omega, rows in itertools.product((2.0, 5.0), (slice(0, 2), slice(2, 3))):
        scheduler.set_timesteps(3)
        x, part = noise[rows] * scheduler.init_noise_sigma, {"class_labels": table["class_labels"][rows]}
        for t in scheduler.timesteps:
            state = scheduler.scale_model_input(x, t), t.expand(len(x)), part
            with torch.no_grad():
                cfg, cond = teacher.predict_cfg(*state, torch.full((len(x),), omega))
                with agd.guided(teacher, omega):
                    student = teacher.predict(*state)
            guidance = cfg - cond
            along = float(((student - cond) * guidance).sum())
            errors.append((omega, float(t), float((student - cfg).square().sum()), float(guidance.square().sum()), along))
            x = scheduler.step(cfg, t, x).prev_sample

    def explained(column, value):
        selected = [row for row in errors if row[column] == value]
        return 1 - sum(row[2] for row in selected) / sum(row[3] for row in selected)

    def strength(omega):
        selected = [row for row in errors if row[0] == omega]
        return sum(row[4] for row in selected) / sum(row[3] for row in selected)

    by_scale = {omega: explained(0, omega) for omega in (2.0, 5.0)}
    strengths = {omega: strength(omega) for omega in (2.0, 5.0)}
    by_time = {t: explained(1, t) for t in scheduler.timesteps.tolist()}
    assert found.by_scale == pytest.approx(by_scale)
    assert found.by_time == pytest.approx(by_time)
    assert found.mean == pytest.approx(sum(by_scale.values()) / 2)
    assert found.strength_by_scale == pytest.approx(strengths) and 0 < strengths[2.0] < 1
    assert found.strength == pytest.approx(sum(strengths.values()) / 2)
    written = json.loads(json.dumps(found.to_dict()))
    assert written["by_scale"] == {"2": found.by_scale[2.0], "5": found.by_scale[5.0]}
    assert written["strength_by_scale"] == {"2": found.strength_by_scale[2.0], "5": found.strength_by_scale[5.0]}


def test_guidance_explained_without_adapter():
    teacher = tiny_teacher()
    with pytest.raises(ValueError, match="no adapter is attached"):
        guidance_explained(teacher, teacher.conditions(range(3)))
