"""Every script in bench/ runs from end to end at a reduced size."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench"


def run(script, *arguments):
    done = subprocess.run([sys.executable, BENCH / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nfe_speed(tmp_path):
    path = tmp_path / "speed.json"
    run("nfe_speed.py", "--batch", 1, 3, "--steps", 2, "--rounds", 2, "--json", path)
    content = json.loads(path.read_text())
    nfe = {(row["batch"], row["arm"]): row["nfe"] for row in content["rows"]}
    assert nfe == {(b, arm): 4 if arm == "cfg" else 2 for b in (1, 3) for arm in ("unguided", "cfg", "agd")}
    flops = {row["arm"]: row["flops_per_step"] for row in content["rows"] if row["batch"] == 3}
    assert flops["cfg"] == 2 * flops["unguided"] and flops["unguided"] < flops["agd"] < 1.05 * flops["unguided"]
    assert all(row["ms_per_image"] > 0 for row in content["rows"]) and content["commit"]


def test_digits_bars(tmp_path):
    path = tmp_path / "bars.json"
    run("digits_bars.py", "--seeds", 2, "--train-steps", 2, "--samples", 60, "--rounds", 0, "--json", path)
    content = json.loads(path.read_text())
    explained = next(bar for bar in content["bars"] if bar["name"] == "guidance explained")
    assert not explained["cleared"] and explained["bound_95"] <= explained["mean"] and len(explained["values"]) == 2


def test_train_digits(tmp_path):
    run("train_digits.py", "--output", tmp_path, "--steps", 2, "--epochs", 2)
    assert (tmp_path / "digits_teacher" / "diffusion_pytorch_model.safetensors").stat().st_size < 1_000_000
    assert json.loads((tmp_path / "training.json").read_text())["classifier_accuracy"] > 0.5
