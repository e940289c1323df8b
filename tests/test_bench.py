"""Every script in bench/ runs from end to end at a reduced size."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import pipeline_digits

BENCH = Path(__file__).parents[1] / "bench"


def run(script, *arguments):
    done = subprocess.run([sys.executable, BENCH / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nfe_speed(tmp_path):
    path = tmp_path / "speed.json"
    run("nfe_speed.py", "--batch", 1, 3, "--steps", 2, "--rounds", 2, "--json", path)
    content = json.loads(path.read_text())
    nfe = {(row["batch"], row["arm"]): row["nfe"] for row in content["rows"]}
    arms = ("unguided", "cfg", "unguided_engine", "cfg_engine", "agd_naive", "agd", "agd_hoisted", "agd_engine", "agd_kernels")
    assert nfe == {(b, arm): 4 if arm.startswith("cfg") else 2 for b in (1, 3) for arm in arms}
    flops = {row["arm"]: row["flops_per_step"] for row in content["rows"] if row["batch"] == 3}
    assert flops["cfg"] == 2 * flops["unguided"] and flops["unguided"] < flops["agd"] < 1.05 * flops["unguided"]
    timed = [row for row in content["rows"] if row["arm"] != "agd_kernels"]
    assert all(row["ms_per_image"] > 0 and row["note"] is None for row in timed) and content["commit"]
    assert content["complete"] and content["rounds"] == 2 and all(row["seconds"]["rounds"] == 2 for row in timed)
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_nfe_speed_of_a_model_without_a_gpu(tmp_path):
    path, plot = tmp_path / "counts.json", tmp_path / "bars.png"
    run("nfe_speed.py", "--model", "dit-xl2-256", "--device", "meta", "--arms", "unguided", "--json", path, "--plot", plot)
    content = json.loads(path.read_text())
    assert [(row["arm"], row["launches_per_step"], row["ms_per_step"]) for row in content["rows"]] == [("unguided", 1148, None)]
    assert content["environment"]["device"] == "meta" and plot.is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "sdxl"], "expected a model of dit-xl2-256, .*found 'sdxl'"),
        (["--arms", "cfg", "agb"], "expected arms of unguided, cfg, .*found 'agb'"),
        (["--device", "meta"], "--device meta goes with --model; expected one or several of dit-xl2-256"),
        (
            ["--model", "sdxl-1024", "--reference-repo", "nowhere"],
            "expected a clone of github.com/cristianpjensen/agd at nowhere",
        ),
    ],
)
def test_nfe_speed_says_what_there_is(arguments, expected):
    done = subprocess.run([sys.executable, BENCH / "nfe_speed.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and re.search(expected, " ".join(done.stderr.split()))


def test_digits_bars(tmp_path):
    path = tmp_path / "bars.json"
    run("digits_bars.py", "--seeds", 2, "--train-steps", 2, "--samples", 60, "--rounds", 0, "--json", path)
    content = json.loads(path.read_text())
    explained = next(bar for bar in content["bars"] if bar["name"] == "guidance explained")
    assert not explained["cleared"] and explained["bound_95"] <= explained["mean"] and len(explained["values"]) == 2


def test_no_two_pictures_of_pipeline_digits_start_from_the_same_noise(monkeypatch):
    seeds = []

    def arm(rows, seed):
        seeds.extend(range(seed, seed + len(rows)))  # as `generate` numbers its generators
        return torch.rand(len(rows), 1, 8, 8)

    monkeypatch.setattr(
        pipeline_digits, "arms_of", lambda *_: {"unguided": arm, "cfg": lambda rows, seed: torch.rand(len(rows), 1, 8, 8)}
    )
    reference = SimpleNamespace(
        images=torch.rand(9, 1, 8, 8), features=lambda x: x.flatten(1)[:, :4], classify=lambda x: x.flatten(1)
    )
    bench = SimpleNamespace(reference=reference, row_labels=torch.arange(10))
    for seed in range(3):
        pipeline_digits.measure(SimpleNamespace(unet=nn.Identity()), bench, 2.0, 450, seed)
    assert len(seeds) == len(set(seeds)) == 3 * 450


def test_train_digits(tmp_path):
    run("train_digits.py", "--output", tmp_path, "--steps", 2, "--epochs", 2)
    assert (tmp_path / "digits_teacher" / "diffusion_pytorch_model.safetensors").stat().st_size < 1_000_000
    assert json.loads((tmp_path / "training.json").read_text())["classifier_accuracy"] > 0.5
