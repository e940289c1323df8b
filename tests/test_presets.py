"""Presets: settings that go together, behind whatever the caller says."""

import pytest

import agd_fast as agd
from agd_fast.distillation.presets import PRESETS, Preset, find_preset
from agd_fast.files import read_json

SMALL = {"trajectories": 2, "sampling_steps": 2, "validation": 0, "progress": False}


def test_papers_presets_are_the_papers():
    for name, hidden, omegas in (
        ("paper-dit", 256, (1.0, 6.0)),
        ("paper-sd21", 320, (1.0, 12.0)),
        ("paper-sdxl", 320, (1.0, 12.0)),
    ):
        preset = PRESETS[name]
        adapter, train = preset.adapter, preset.train
        assert (adapter.kind, adapter.hidden, adapter.omega_features) == ("cross_attention", hidden, "fourier")
        assert not adapter.identity_at_one and adapter.guidance_range == omegas
        assert (train.steps, train.batch_size, train.learning_rate, train.weighting) == (5000, 64, 1e-4, "uniform")
        assert (train.warmup, train.loss) == (0.1, "l2")


def test_no_preset_is_what_distill_does_anyway():
    assert find_preset(None).adapter == agd.AdapterConfig() and find_preset(None).train == agd.TrainConfig()


def test_unknown_preset_is_named(dit, tmp_path):
    with pytest.raises(ValueError, match=r"preset must be one of small, .*paper-sdxl; found 'flux'"):
        agd.distill(dit.teacher(), class_labels=[1], preset="flux", output_dir=tmp_path)


def test_what_the_caller_gives_goes_before_the_preset(dit, tmp_path):
    config = agd.TrainConfig(steps=1, batch_size=2, learning_rate=1e-4)
    teacher = dit.teacher()
    agd.distill(teacher, class_labels=[1], preset="paper-dit", train_config=config, output_dir=tmp_path, **SMALL)
    found = read_json(tmp_path / "adapter_config.json")
    assert found["adapter"]["kind"] == "cross_attention" and found["adapter"]["hidden"] == 256
    assert found["adapter"]["guidance_range"] == [1.0, 6.0] and found["about"]["train"]["steps"] == 1
    agd.unload(teacher)
    smaller = agd.AdapterConfig("offset", 2)
    agd.distill(
        teacher,
        class_labels=[1],
        preset="paper-dit",
        adapter=smaller,
        guidance_range=(1, 3),
        train_config=config,
        output_dir=tmp_path / "other",
        **SMALL,
    )
    found = read_json(tmp_path / "other" / "adapter_config.json")["adapter"]
    assert found["kind"] == "offset" and found["guidance_range"] == [1.0, 3.0]


def test_preset_decides_what_is_collected(dit, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", Preset(trajectories=3, sampling_steps=4, keep_steps=2))
    config = agd.TrainConfig(steps=1, batch_size=2)
    agd.distill(
        dit.teacher(),
        class_labels=[1],
        preset="tiny",
        adapter=agd.AdapterConfig("offset", 2),
        train_config=config,
        output_dir=tmp_path,
        validation=0,
        progress=False,
    )
    plan = read_json(tmp_path / "trajectories" / "manifest.json")["plan"]
    assert (plan["trajectories"], plan["steps"], plan["keep"]) == (3, [4, 4], 2)
