"""An adapter that is asked for more guidance where it gives less than its teacher."""

import json
import shutil

import pytest
import torch

import agd_fast as agd
from agd_fast.adapters.calibration import Calibration
from agd_fast.attaching import require_attachment
from agd_fast.distillation.calibration import LARGEST_FACTOR, calibration_of
from agd_fast.evaluation import Explained, guidance_explained
from agd_fast.files import read_json
from agd_fast.storage import read_config
from helpers_distillation import distill_tiny, short, tiny_teacher
from helpers_engine import Reading, assert_same, call, differs, programs, reasons, twins
from helpers_families import to_distil
from tiny import FAMILIES

NAN = float("nan")
RUN = {"train_config": short(steps=15), "guidance_range": (1.0, 6.0), "validation": 20}
TWICE = Calibration([0.0], [1.0], [[2.0]], (1.0, 8.0))
SETTINGS = {
    "times": [100.0, 500.0],
    "omegas": [2.0, 4.0],
    "factors": [[1.0, 2.0], [1.5, 1.0]],
    "guidance_range": [1.0, 6.0],
}


def of(omega, t, **changed):
    return Calibration(**{**SETTINGS, **changed})(torch.tensor([omega]), torch.tensor([float(t)])).item()


def test_factors_are_interpolated_and_constant_outside():
    assert [of(2.0, 100), of(4.0, 100), of(2.0, 500), of(4.0, 500)] == [2.0, 6.0, 2.5, 4.0]
    assert of(3.0, 300) == pytest.approx(1 + 2 * (1 + 2 + 1.5 + 1) / 4)
    assert of(2.0, 200) == pytest.approx(1 + 1.125)
    assert of(1.5, 0) == pytest.approx(1.5) and of(2.0, 999) == pytest.approx(2.5)


def test_no_guidance_stays_none_and_no_scale_leaves_the_range_by_it():
    assert of(1.0, 100) == 1.0
    assert of(5.0, 100) == 6.0  # of 1 + 4·2
    assert of(7.0, 100) == 7.0  # outside already
    weaker = {"factors": [[0.5, 0.5], [0.5, 0.5]]}
    assert of(5.0, 100, **weaker) == 3.0
    assert of(5.0, 100, **weaker, guidance_range=[4.0, 6.0]) == 4.0
    assert of(3.0, 100, **weaker, guidance_range=[4.0, 6.0]) == 3.0
    assert of(1.0, 100, **weaker, guidance_range=[4.0, 6.0]) == 1.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factors": [[1.0, 2.0]]}, r"expected positive factors \[2, 2\] of a calibration, found \[1, 2\]$"),
        ({"factors": []}, r"expected positive factors \[2, 2\] of a calibration, found \[0\]$"),
        ({"factors": [[1.0, 0.0], [1.0, 1.0]]}, r"expected positive factors \[2, 2\] .*, found \[2, 2\], among them 0$"),
        ({"factors": [[1.0, NAN], [1.0, 1.0]]}, "expected positive factors"),
        ({"times": [500.0, 100.0]}, r"expected ascending times of a calibration, found \[500\.0, 100\.0\]"),
        ({"omegas": [2.0, NAN]}, "expected ascending omegas"),
        ({"guidance_range": [6.0]}, "expected ascending guidance_range"),
        ({"guidance_range": [1.0, NAN]}, "expected ascending guidance_range"),
    ],
)
def test_what_is_no_calibration(changed, message):
    with pytest.raises(ValueError, match=message):
        of(2.0, 100, **changed)


def test_a_calibration_makes_up_for_the_strength_that_was_measured():
    strengths = {2.0: {900.0: 0.8, 100.0: 0.1, 50.0: -0.2}, 1.5: {900.0: NAN, 100.0: 4.0, 50.0: 1.0}}  # NaN: no guidance there
    found = calibration_of(Explained(0.0, {}, {}, {}, strengths), (1.0, 6.0)).to_dict()
    assert found["times"] == [50.0, 100.0, 900.0] and found["omegas"] == [1.5, 2.0] and found["guidance_range"] == [1.0, 6.0]
    bounds = [pytest.approx(1 / LARGEST_FACTOR), pytest.approx(LARGEST_FACTOR)]
    assert found["factors"] == [[1.0, 1.0], bounds, [1.0, pytest.approx(1.25)]]


def test_strength_is_measured_at_each_scale_and_timestep():
    teacher = tiny_teacher()

    def student(x, t, conditions, omega):
        return teacher.predict_cfg(x, t, conditions, 1 + (0.5 + t / 4000) * (omega - 1))[0]

    table = teacher.conditions([0, 1])
    found = guidance_explained(teacher, table, student=student, scales=(2.0, 5.0), steps=4)
    for omega in (2.0, 5.0):
        assert found.strength_by_time[omega] == {t: pytest.approx(0.5 + t / 4000, rel=1e-3) for t in (999, 749, 499, 249)}


def test_it_is_put_where_the_weights_are_and_keeps_its_values():
    adapter = agd.attach(tiny_teacher())
    adapter.to("meta")
    adapter.calibrate(Calibration(**SETTINGS))
    assert {buffer.device.type for buffer in adapter.calibration.buffers()} == {"meta"}
    times = [900.0, 996.0, 998.0, 999.0, 1000.0]  # some are the same in bfloat16
    found = Calibration(times, [2.0], [[1.2]] * 5, (1.0, 6.0)).to(torch.bfloat16)
    assert found.to_dict()["times"] == times
    asked = found(torch.full((5,), 2.0, dtype=torch.bfloat16), torch.tensor(times, dtype=torch.bfloat16))
    assert asked.tolist() == pytest.approx([2.2] * 5, rel=2**-7)


def test_a_calibration_makes_another_adapter_of_it():
    adapter = agd.attach(tiny_teacher())
    plain = adapter.hash
    adapter.calibrate(Calibration(**SETTINGS))
    calibrated = adapter.hash
    adapter.calibrate(TWICE)
    assert len({plain, calibrated, adapter.hash}) == 3
    adapter.calibrate(None)
    assert adapter.hash == plain


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same short run without a calibration and with one."""
    folder = tmp_path_factory.mktemp("runs")
    plain = distill_tiny(folder / "plain", **RUN)
    return folder, plain, distill_tiny(folder / "calibrated", calibrate=True, **RUN)


def test_a_calibrated_adapter_guides_as_strongly_as_its_teacher(runs):
    folder, plain, found = runs
    assert plain.explained.strength_by_scale[2.0] < 0.9
    assert abs(1 - found.explained.strength_by_scale[2.0]) < (1 - plain.explained.strength_by_scale[2.0]) / 3
    for one, other in zip(plain.adapter.parameters(), found.adapter.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {*found.seconds} == {*plain.seconds, "calibrate"}
    assert read_json(folder / "calibrated" / "distill.json")["guidance_explained"] == found.explained.to_dict()


def test_it_is_loaded_with_its_adapter(runs, tmp_path):
    folder, _, found = runs
    teacher = agd.load(tiny_teacher(), folder / "calibrated")
    loaded = require_attachment(teacher).adapter.calibration
    assert loaded.to_dict() == found.adapter.calibration.to_dict()
    state = torch.randn(2, 1, 4, 4), torch.tensor([700.0, 300.0]), {"class_labels": torch.tensor([0, 1])}
    omega = torch.tensor([2.0, 3.0])
    uncalibrated = agd.load(tiny_teacher(), folder / "plain")
    asked = uncalibrated.predict_agd(*state, loaded(omega, state[1]))
    assert torch.equal(teacher.predict_agd(*state, omega), asked)
    assert not torch.allclose(uncalibrated.predict_agd(*state, omega), asked)
    assert read_config(agd.save(uncalibrated, tmp_path))["calibration"] is None


def test_a_finished_run_is_calibrated_without_being_trained_again(runs, tmp_path):
    folder, plain, found = runs
    shutil.copytree(folder / "plain", tmp_path / "run")
    again = distill_tiny(tmp_path / "run", calibrate=True, **RUN)
    assert again.adapter.calibration.to_dict() == found.adapter.calibration.to_dict()
    assert again.explained == found.explained
    assert (tmp_path / "run" / "log.jsonl").read_text() == (folder / "plain" / "log.jsonl").read_text()
    assert distill_tiny(tmp_path / "run", **RUN).explained == plain.explained
    assert read_config(tmp_path / "run")["calibration"] is None


def test_an_adapter_is_trained_on_without_its_calibration(runs, tmp_path):
    folder = runs[0]
    both = []
    for init in ("plain", "calibrated"):
        settings = {"init": folder / init, "train_config": short(steps=3), "validation": 0, "guidance_range": (1.0, 6.0)}
        both.append(distill_tiny(tmp_path / init, **settings))
    assert both[1].adapter.calibration is None
    for one, other in zip(both[0].adapter.parameters(), both[1].adapter.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_damaged_calibration_is_refused(runs, tmp_path):
    teacher = agd.load(tiny_teacher(), runs[0] / "calibrated")
    path = agd.save(teacher, tmp_path) / "adapter_config.json"
    config = json.loads(path.read_text())
    config["calibration"]["factors"].pop()
    path.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"does not describe an adapter: .*positive factors \[3, 5\] of a calibration, found \[2, 5\]"
    ):
        agd.load(tiny_teacher(), tmp_path)


def test_without_held_out_trajectories_there_is_nothing_to_calibrate_by(tmp_path):
    with pytest.raises(ValueError, match="calibrate=True expects held-out trajectories to measure on, found validation=0"):
        distill_tiny(tmp_path, calibrate=True, validation=0)


def test_each_denoiser_of_a_pipeline_is_calibrated_where_it_runs(tmp_path):
    family = FAMILIES["wan22"]
    pipe = family.pipeline()
    agd.distill(
        pipe,
        output_dir=tmp_path,
        **{**to_distil(pipe, family), "guidance_range": (1.0, 9.0)},
        adapter={"hidden": 4},
        trajectories=2,
        sampling_steps=4,
        train_config=short(steps=2),
        validation=1,
        calibrate=True,
        progress=False,
    )
    first, second = (require_attachment(one).adapter.calibration for one in (pipe.transformer, pipe.transformer_2))
    assert first.times.min() > second.times.max() and len(first.times) + len(second.times) == 4
    for calibration in (first, second):
        assert calibration.to_dict()["omegas"] == [1.5, 2.0, 3.0, 4.0, 6.0, 9.0]
    again = agd.load(agd.unload(pipe), tmp_path)
    assert require_attachment(again.transformer_2).adapter.calibration.to_dict() == second.to_dict()


@pytest.mark.parametrize("kind", ["modulation+gated_lora", "cross_attention"])
def test_the_engine_asks_for_the_same(kind):
    plain, fast = twins(kind=kind)
    before = call(plain)
    assert_same(call(fast), before)
    factors = [[1.0, 1.2], [1.3, 1.1]]
    for pipe in (plain, fast):
        require_attachment(pipe).adapter.calibrate(Calibration([200.0, 800.0], [2.0, 5.0], factors, (1.0, 8.0)))
    expected = call(plain)
    assert differs(expected, before)
    for _ in range(2):
        assert_same(call(fast), expected)
    varying = {"guidance_scale": lambda fraction: 2 + 3 * fraction}
    assert_same(call(fast, **varying), call(plain, **varying))
    assert not reasons(fast) and programs(fast.unet)
    for pipe in (plain, fast):
        require_attachment(pipe).adapter.calibrate(None)
    assert_same(call(fast), before)


@pytest.mark.parametrize("kind", ["modulation", "modulation+gated_lora", "cross_attention", "offset"])
def test_no_operation_is_added_to_a_step_of_the_engine(kind):
    _, fast = twins(kind=kind)

    def operations():
        counts = []
        for steps in (4, 6):
            call(fast, num_inference_steps=steps)
            with Reading() as found:
                call(fast, num_inference_steps=steps)
            counts.append(found.operations)
        return (counts[1] - counts[0]) / 2

    before = operations()
    require_attachment(fast).adapter.calibrate(Calibration(**SETTINGS))
    assert operations() == before > 0


def test_a_scale_is_that_of_a_call_and_the_range_is_asked_about_it(recwarn):
    plain, _ = twins()
    config = require_attachment(plain).adapter.config
    require_attachment(plain).adapter.calibrate(TWICE)
    call(plain, guidance_scale=config.guidance_range[1])
    assert not [warning for warning in recwarn if "the range this adapter was trained on" in str(warning.message)]
