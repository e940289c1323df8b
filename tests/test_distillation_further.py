"""agd_fast.distill from another adapter, on its own states, over its range and by its teacher's rule."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.loss import distillation_loss
from agd_fast.distillation.train import _update_average, batch_rows
from agd_fast.evaluation.explained import guidance_explained
from agd_fast.files import fingerprint, read_json, read_tensors
from agd_fast.trajectories import Trajectories
from helpers_distillation import (
    contents,
    custom_teacher,
    ddim,
    distill_tiny,
    dit,
    logged,
    short,
    small,
    tiny_teacher,
)


def first_loss(directory, teacher, config, **settings):
    """The logged loss of a first training step, and that of the teacher's adapter as it is, on the same states."""
    distill_tiny(directory, tiny_teacher(), train_config=config, **settings)
    states = Trajectories(directory / "trajectories")
    batch = states[batch_rows(0, config.batch_size, len(states), 0)]
    with torch.no_grad():
        prediction = teacher.predict_agd(batch.sample, batch.timestep, batch.conditions, batch.omega)
    expected = distillation_loss(prediction, batch.target, batch.omega, config.loss, config.weighting)
    return logged(directory)[0]["loss"], float(expected)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A trained adapter to go on from, of a range and a width that are not the defaults."""
    directory = tmp_path_factory.mktemp("before") / "adapter"
    distill_tiny(directory, adapter=small(hidden=5), guidance_range=(1.0, 4.0))
    return directory


@pytest.mark.parametrize("source", ["trajectories", "student"])
def test_distill_goes_on_from_another_adapter(tmp_path, before, source):
    teacher = agd.load(tiny_teacher(), before)
    found, expected = first_loss(tmp_path, teacher, short(log_every=1), adapter=None, init=before, source=source)
    assert found == expected
    config, trained_before = (read_json(folder / "adapter_config.json") for folder in (tmp_path, before))
    assert config["adapter"] == trained_before["adapter"]
    weights = fingerprint(read_tensors(before / "adapter.safetensors")[0])
    assert (config["about"]["source"], config["about"]["init"]) == (source, weights)
    assert (trained_before["about"]["source"], trained_before["about"]["init"]) == ("trajectories", None)
    assert config["about"]["teacher"] == "agd_fast.ops.guidance_combine"
    collected_with = read_json(tmp_path / "trajectories" / "manifest.json")["plan"]["adapter"]
    assert (collected_with and collected_with["hash"]) == (weights if source == "student" else None)


def test_distill_on_its_own_states_lowers_the_error_there(tmp_path):
    settings = {"train_config": TrainConfig(steps=60, batch_size=16), "trajectories": 30, "shard_size": 30}
    distill_tiny(tmp_path / "a", **settings)
    distill_tiny(tmp_path / "b", teacher := tiny_teacher(), source="student", init=tmp_path / "a", **settings)
    table, options = teacher.conditions(list(range(3)) * 4), {"states": "student", "steps": 4}
    after = guidance_explained(teacher, table, **options).mean
    earlier = guidance_explained(agd.load(tiny_teacher(), tmp_path / "a"), table, **options).mean
    assert after > earlier > 0


def test_distill_goes_on_at_another_checkpoint_of_the_base(tmp_path, before):
    result = distill_tiny(tmp_path, tiny_teacher(seed=1), adapter=None, init=before)
    assert result.adapter.config.guidance_range == (1.0, 4.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": small(hidden=4, guidance_range=(1.0, 4.0))}, "adapter.* asked for .hidden: expected 4, found 5"),
        ({"adapter": agd.AdapterConfig(kind="offset", guidance_range=(1.0, 4.0))}, "kind: expected 'offset', found 'modulation'"),
        ({"adapter": {"hiden": 4}}, r"unknown \['hiden'\]"),
        ({"guidance_range": (1, 6)}, r"guidance_range: expected \[1.0, 6.0\], found \[1.0, 4.0\]"),
        ({"teacher": dit(width=32)}, r"width mismatch at .* 16 → 96 channels, this base 32 → 192"),
        ({"teacher": custom_teacher()}, "adapter for a DiTTransformer2DModel, expected one for this Net"),
        ({"scheduler": EulerDiscreteScheduler()}, "prediction_type='v_prediction', expected 'epsilon'"),
    ],
)
def test_distill_refuses_an_adapter_that_does_not_fit(tmp_path, before, settings, message):
    settings = {"teacher": tiny_teacher(), "adapter": None, **settings}
    if isinstance(settings["teacher"], torch.nn.Module):
        settings["scheduler"] = ddim()
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", init=before, **settings)
    assert attachment_of(settings["teacher"]) is None
    assert contents(tmp_path / "run").keys() <= {".lock"}


@pytest.mark.parametrize("adapter", [agd.AdapterConfig(guidance_range=(1.0, 4.0)), {"guidance_range": (1, 4)}])
def test_distill_leaves_open_what_a_config_does_not_decide(tmp_path, before, adapter):
    assert distill_tiny(tmp_path, adapter=adapter, init=before).adapter.config.hidden == 5


def test_distill_needs_a_trained_adapter_for_its_own_states(tmp_path, before):
    with pytest.raises(ValueError, match=r"source='student' expects init=.*found None"):
        distill_tiny(tmp_path, source="student")
    with pytest.raises(FileNotFoundError, match="expected adapter_config.json"):
        distill_tiny(tmp_path, source="student", init=tmp_path / "nothing")
    saved = contents(before)
    with pytest.raises(ValueError, match="expected an output_dir other than init"):
        distill_tiny(before, init=before.parent / "." / before.name, adapter=None)
    assert contents(before) == saved
    assert contents(tmp_path) == {}


def test_distill_takes_the_range_of_the_config_or_its_own(tmp_path):
    ranges = {"config": ({}, (1.0, 3.0)), "own": ({"guidance_range": (2, 5)}, (2.0, 5.0))}
    for name, (settings, expected) in ranges.items():
        result = distill_tiny(tmp_path / name, adapter=small(guidance_range=(1.0, 3.0)), **settings)
        assert result.adapter.config.guidance_range == expected
        omega = Trajectories(tmp_path / name / "trajectories")[torch.arange(18)].omega
        assert expected[0] <= omega.min() < omega.max() <= expected[1]


def conditional(uncond, cond, omega):
    """A rule that does not guide: what a fresh adapter predicts already."""
    return cond


def test_distill_follows_the_teachers_rule_of_guidance(tmp_path):
    base = tiny_teacher()
    teacher = agd.Teacher(base.denoiser, base.scheduler, guidance=conditional)
    distill_tiny(tmp_path / "a", teacher)
    assert logged(tmp_path / "a")[0]["loss"] == pytest.approx(0, abs=torch.finfo(torch.float32).eps)
    assert read_json(tmp_path / "a" / "adapter_config.json")["about"]["teacher"] == f"{__name__}.conditional"
    states = Trajectories(tmp_path / "a" / "trajectories")
    expected = f"guidance: expected 'agd_fast.ops.guidance_combine', found '{__name__}.conditional'"
    with pytest.raises(ValueError, match=expected):
        distill_tiny(tmp_path / "b", trajectories=states)


def test_an_average_in_host_memory_waits_once_for_the_weights_of_a_step(monkeypatch):
    events, average = [], nn.ParameterList([torch.zeros(2), torch.zeros(3)]).requires_grad_(False)

    class Weight:
        """On a card."""

        device = torch.device("cuda", 0)

        def __init__(self, size):
            self.size = size

        def detach(self):
            return self

        def to(self, device, non_blocking):
            events.append((device.type, non_blocking))
            return torch.full((self.size,), 3.0)

    def synchronize():
        events.append("done")
        for one in average:
            one.fill_(1)  # which an update before it would have moved from zero

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=synchronize))
    adapter = SimpleNamespace(parameters=lambda: iter([Weight(2), Weight(3)]))
    _update_average(average, adapter, 0.9, 0)
    assert events == [("cpu", True), ("cpu", True), "done"]
    for one in average:
        torch.testing.assert_close(one, torch.full_like(one, 1 + 0.9 * 2))  # a decay of 0.1 at the first step
