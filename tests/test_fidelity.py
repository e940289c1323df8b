"""The fidelity bench from end to end at a reduced size: teachers, every arm, claims, report."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from quality import report, scoring
from quality.data import load_data
from quality.run import require_sizes

BENCH = Path(__file__).parents[1] / "bench"
SIZES = ["--samples", 20, "--held-out", 4, "--sampling-steps", 2]


def fidelity(*arguments):
    command = [sys.executable, BENCH / "fidelity.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A set of JPEG photographs in the format of cifar10_train_jpeg.npz: noise of ten colours."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for half in ("train", "test"):
        labels = np.arange(60, dtype=np.uint8) % 10
        files = []
        for label in labels:
            pixels = (random.integers(0, 100, (32, 32, 3)) + 15 * label).astype(np.uint8)
            Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG")
            files.append(file.getvalue())
        offsets = np.cumsum([0, *map(len, files)])
        names = np.array([f"thing{n}" for n in range(10)])
        jpeg = np.frombuffer(b"".join(files), np.uint8)
        np.savez(folder / f"photos_{half}_jpeg.npz", jpeg=jpeg, offsets=offsets, labels=labels, classes=names)
    return folder / "photos_train_jpeg.npz"


@pytest.mark.parametrize("model", ["dit", "unet"])
def test_photographs_from_training_to_merged_results(photos, tmp_path, model):
    command = ["photographs", "--data", photos, "--models", model, "--adapters", "modulation", "full", "--smoke"]
    command += ["--seeds", 1, "--scales", 2, "--output", tmp_path]
    assert "merged into" in fidelity(*command)
    merged = json.loads((tmp_path / f"photos-{model}.json").read_text())
    assert {row["arm"]["kind"] for row in merged["rows"]} == {"modulation", "full"}
    assert merged["teacher"]["data"] == "photos" and merged["floor"] > 0 and merged["references"][0]["cfg"]["2"]["frechet"] > 0
    teacher = tmp_path / "teachers" / f"photos-{model}"
    assert "is finished" in fidelity("teacher", "--data", photos, "--model", model, "--smoke", "--output", teacher)


def test_photographs_are_shrunk_to_means_of_their_pixels(photos):
    whole, shrunk = load_data(photos), load_data(photos, size=16)
    assert shrunk.name == "photos-16" and shrunk.shape == (3, 16, 16) and shrunk.test_images.shape[-1] == 16
    expected = whole.images.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    assert torch.equal(shrunk.images, expected.round().to(torch.uint8))
    with pytest.raises(ValueError, match="expected a size that divides the images' side of 32, found 12"):
        load_data(photos, size=12)
    with pytest.raises(ValueError, match="expected photographs to shrink"):
        load_data("digits", size=4)


def test_a_teacher_of_shrunk_photographs_is_distilled(photos, tmp_path):
    teacher = tmp_path / "photos-16-unet"
    fidelity("teacher", "--data", photos, "--model", "unet", "--size", 16, "--smoke", "--output", teacher)
    command = ["run", "--teacher", teacher, "--data", photos, "--steps", 2, "--trajectories", 4, "--scales", 2, *SIZES]
    assert "merged into" in fidelity(*command, "--size", 16, "--output", tmp_path / "runs")


def test_photographs_start_no_teacher_that_the_minutes_are_too_few_for(photos, tmp_path):
    found = fidelity("photographs", "--data", photos, "--minutes", 7, "--output", tmp_path)
    assert "stopped before the dit" in found and not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def digits_runs(tmp_path_factory):
    """All arms on the captioned digits, barely trained; the folder of the runs."""
    output = tmp_path_factory.mktemp("runs") / "digits-unet"
    common = ["--teacher", BENCH / "teachers" / "digits-unet", "--steps", 2, "--trajectories", 10, "--scales", 2, *SIZES]
    kinds = ["offset:paper", "cross_attention", "modulation+gated_lora", "text_embedding"]
    fidelity("run", *common, "--adapters", *kinds, "--output", output)
    fidelity("run", *common, "--adapters", "modulation", "--sources", "trajectories", "data", "student", "--output", output)
    return output


def test_every_arm_and_source_is_scored_on_three_kinds_of_states(digits_runs):
    rows = json.loads(digits_runs.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 7
    for row in rows:
        assert row["explained"].keys() == {"guided", "data", "student"}
        assert row["arm"]["kind"] == "full" or row["fraction"] <= 0.05
        assert row["images"]["2"].keys() == {"frechet", "accuracy", "rmse"}
    assert {row["arm"]["source"] for row in rows} == {"trajectories", "data", "student"}


def test_adapters_are_scored_again_once_calibrated(digits_runs, tmp_path):
    rows = json.loads(digits_runs.with_suffix(".json").read_text())["rows"]
    assert {"calibrated" in row for row in rows if row["arm"]["kind"] != "text_embedding"} == {True}
    for row in rows:
        assert row["explained"]["guided"].keys() == {"mean", "by_scale", "by_time", "strength", "strength_by_scale"}
        if "calibrated" in row:
            found = row["calibrated"]
            assert found["explained"]["guided"] != row["explained"]["guided"]
            assert found["images"]["2"]["rmse"] != row["images"]["2"]["rmse"]
    fidelity("report", digits_runs.with_suffix(".json"), "--output", tmp_path)
    page = (tmp_path / "fidelity.md").read_text().split("### Calibrated")[1].split("###")[0]
    assert page.count("→") == 5 * sum("calibrated" in row for row in rows)


def test_a_run_that_is_there_is_not_done_again(digits_runs):
    before = {path: path.stat().st_mtime_ns for path in digits_runs.glob("*seed0.json")}
    common = ["--teacher", BENCH / "teachers" / "digits-unet", "--steps", 2, "--trajectories", 10, "--scales", 2, *SIZES]
    fidelity("run", *common, "--adapters", "cross_attention", "modulation", "--output", digits_runs)
    assert {path: path.stat().st_mtime_ns for path in digits_runs.glob("*seed0.json")} == before


def test_an_arm_that_cannot_be_so_small_is_left_out(digits_runs):
    common = ["--teacher", BENCH / "teachers" / "digits-unet", "--steps", 2, "--trajectories", 10, "--scales", 2, *SIZES]
    said = fidelity("run", *common, "--adapters", "modulation", "--fractions", 1e-4, "--output", digits_runs)
    assert "skipped: the smallest 'modulation' adapter" in said and "max_fraction=0.0001" in said
    assert not list(digits_runs.glob("modulation-ours-0.0001-*.json"))


def test_claims_and_report(digits_runs, tmp_path):
    names = ["omega_range", "unseen_captions", "guiders"]
    small = ["--steps", 2, "--trajectories", 10, *SIZES]
    teacher = BENCH / "teachers" / "digits-unet"
    fidelity("claims", "--teacher", teacher, "--names", *names, *small, "--output", digits_runs)
    merged = digits_runs.with_suffix(".json")
    claims = json.loads(merged.read_text())["claims"]
    assert {claim["claim"] for claim in claims} == set(names)
    assert all(torch.tensor(list(claim["values"].values())).isfinite().all() for claim in claims)
    fidelity("report", merged, "--output", tmp_path)
    page = (tmp_path / "fidelity.md").read_text()
    assert "text embedding" in page and "offset, paper form" in page and "unseen captions" in page
    assert (tmp_path / "fidelity_digits-unet.png").stat().st_size > 10_000


def test_the_page_is_what_the_report_writes_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "save_panels", lambda *_: None)
    monkeypatch.setattr(report, "save_grid", lambda *_: None)
    report.write_report(sorted((BENCH / "results" / "fidelity").glob("*.json")), tmp_path)
    assert (tmp_path / "fidelity.md").read_text() == (BENCH.parent / "docs" / "fidelity.md").read_text()


def test_a_folder_is_of_one_size(tmp_path):
    require_sizes(tmp_path / "runs", scoring.Sizes(samples=20))
    require_sizes(tmp_path / "runs", scoring.Sizes(samples=20))
    with pytest.raises(
        ValueError, match=r"runs of other sizes \(trajectories: expected 50, found 100\); expected another --output"
    ):
        require_sizes(tmp_path / "runs", scoring.Sizes(samples=20, trajectories=50))


class NoiseAlone:
    """A stochastic scheduler of two steps whose samples are the noise of the last one."""

    timesteps = torch.tensor([2, 1])

    def set_timesteps(self, steps):
        pass

    def step(self, prediction, t, x, return_dict, generator):
        return (torch.randn(x.shape, generator=generator),)


def test_noise_of_steps_is_neither_that_they_start_from_nor_that_of_other_images(monkeypatch):
    monkeypatch.setattr(scoring, "BATCH", 2)
    bench = SimpleNamespace(
        teacher=SimpleNamespace(sample_shape=(1, 4, 4), device="cpu", scheduler=NoiseAlone()), table={}, row_labels=torch.zeros(1)
    )
    seen = []

    def student(x, t, conditions, omega):
        seen.append(x)
        return x

    images = scoring.draw(bench, student, 2.0, 0, scoring.Sizes(samples=4))
    drawn = torch.cat([*seen, images]).flatten(1)
    assert len(drawn) == 12 and len(drawn.unique(dim=0)) == 12
    assert torch.equal(scoring.draw(bench, student, 2.0, 0, scoring.Sizes(samples=4)), images)


def test_unknown_adapters_are_named():
    command = [sys.executable, BENCH / "fidelity.py", "run", "--adapters", "lora"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "expected KIND or KIND:paper" in done.stderr and "'lora'" in done.stderr


def test_missing_weights_of_inception_are_named(tmp_path):
    command = [sys.executable, BENCH / "fidelity.py", "run", "--inception", tmp_path / "none.pth"]
    command += ["--teacher", BENCH / "teachers" / "digits-unet", "--adapters", "modulation"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and "expected the weights of Inception, found no file" in done.stderr


def test_images_are_measured_in_a_second_set_of_features_where_the_bench_has_them(tmp_path):
    script = """
import dataclasses, sys
from quality.scoring import measure
from quality.teachers import load_teacher
from agd_fast.evaluation import Reference
bench = load_teacher(sys.argv[1])
noise = bench.reference.images[:100].flip(0)
assert "fid" not in measure(bench, noise)
bench = dataclasses.replace(bench, inception=Reference(bench.reference.images, lambda x: x.flatten(1)[:, :8]))
found = measure(bench, noise)
assert found["fid"] > 0 and found["fid"] != found["frechet"], found
"""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, tmp_path / "script.py", BENCH / "teachers" / "digits-unet"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(BENCH)})
    assert done.returncode == 0, done.stderr


def test_the_report_shows_fid_where_it_was_measured(digits_runs, tmp_path):
    merged = json.loads(digits_runs.with_suffix(".json").read_text())
    for reference in merged["references"]:
        for found in (reference["unguided"], *reference["cfg"].values()):
            found["fid"] = 40.0
    for row in merged["rows"]:
        for found in row["images"].values():
            found["fid"] = 30.0
    changed = tmp_path / "digits-unet.json"
    changed.write_text(json.dumps({**merged, "inception_floor": 12.345}))
    fidelity("report", changed, "--output", tmp_path)
    page = (tmp_path / "fidelity.md").read_text()
    assert "12.345" in page and "| FID |" in page and "FID AGD / CFG, ω = 2" in page and "0.750" in page
