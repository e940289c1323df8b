"""The command line from end to end, as a user runs it."""

import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image, ImageChops, ImageStat
from typer.testing import CliRunner

import agd_fast
from agd_fast import cli
from agd_fast.cli import app
from agd_fast.cli.reading import parse_labels
from agd_fast.distillation.presets import PRESETS
from agd_fast.ops import OPS, kernels_info

AGD_FAST = Path(sys.executable).with_name("agd-fast")


def run(*arguments, check=True, cwd=None):
    done = subprocess.run([AGD_FAST, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=None)
    if check:
        assert done.returncode == 0, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """A short run of `agd-fast distill`."""
    output = tmp_path_factory.mktemp("cli") / "run"
    done = run("distill", "--output", output, "--steps", 60, "--trajectories", 60, "--batch-size", 64)
    assert "of the guidance" in done.stdout and "collecting 60 trajectories" in done.stderr + done.stdout
    return output


def test_distill_writes_an_adapter(distilled):
    names = {path.name for path in distilled.iterdir()}
    assert {"adapter.safetensors", "adapter_config.json", "distill.json", "log.jsonl", "trajectories"} <= names
    assert json.loads((distilled / "distill.json").read_text())["guidance_explained"]["mean"] > 0.3


def test_distill_goes_on_with_the_states_of_its_adapter(distilled, tmp_path):
    short = ("--steps", 2, "--batch-size", 8, "--trajectories", 5)
    run("distill", "--output", tmp_path / "b", "--init", distilled, "--source", "student", *short)
    about = json.loads((tmp_path / "b" / "adapter_config.json").read_text())["about"]
    assert about["source"] == "student" and about["init"]
    done = run("distill", "--output", tmp_path / "c", "--init", distilled, "--kind", "offset", *short, check=False)
    assert done.returncode == 1 and "kind: expected 'offset', found 'modulation'" in done.stderr
    assert not (tmp_path / "c").exists()


def test_sample_writes_a_picture(distilled, tmp_path):
    picture = tmp_path / "samples.png"
    run("sample", distilled, "--output", picture, "--labels", "0-3", "--compare", "--steps", 5)
    assert Image.open(picture).size[0] > 300
    optimized = tmp_path / "optimized.png"
    run("sample", distilled, "--output", optimized, "--labels", "0-3", "--compare", "--steps", 5, "--optimize")
    pictures = [Image.open(path).convert("L") for path in (picture, optimized)]
    assert ImageStat.Stat(ImageChops.difference(*pictures)).mean[0] < 0.1


def test_evaluate_writes_a_report(distilled, tmp_path):
    done = run("evaluate", distilled, "--output", tmp_path, "--samples", 100, "--rounds", 2, "--steps", 5)
    assert "Fréchet" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.html", "grid.png", "curve.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", 3], "--samples: precision and recall of digits expect at least 4, found 3"),
        (
            ["--model", "nowhere", "--inputs", __file__, "--labels", "0-3"],
            "expected one of --prompts, --inputs, --labels; found --inputs and --labels",
        ),
    ],
)
def test_evaluate_says_what_it_cannot_measure(options, message, tmp_path):
    done = run("evaluate", tmp_path, *options, check=False)
    assert done.returncode == 2 and message in " ".join(done.stderr.replace("│", " ").split())


def test_info_describes_an_adapter(distilled):
    done = run("info", distilled)
    assert "DiTTransformer2DModel" in done.stdout and "modulation" in done.stdout and "torch" in done.stdout


def test_info_says_whether_kernels_run(monkeypatch):
    from agd_fast import environment, ops

    def shown(**changed):
        found = {**kernels_info(), "missing": "", "failed": {}, **changed}
        monkeypatch.setattr(ops, "kernels_info", lambda: found)
        monkeypatch.setattr(environment, "kernels_info", lambda: found)
        return CliRunner().invoke(app, "info", catch_exceptions=False, env={"COLUMNS": "300"}).stdout

    without = shown(missing="no CUDA device", policy="never")
    assert "no: no CUDA device" in without and "do not run: no CUDA device" in without and "measured" not in without
    assert "policy" in without and "never" in without and all(name in without for name in OPS)
    found = shown(measured=7, kept="/cache/H.json", failed={"gated_lora": "its kernel failed ([x])"})
    assert "yes" in found and "can run" in found and "7 shapes on this card, kept in /cache/H.json" in found
    assert "gated_lora is left to torch" in found and "its kernel failed ([x])" in found


def test_demo_report_holds_what_it_promises(tmp_path):
    """The demo's own path at a reduced size: every entry of report.json, pictures that open."""
    from agd_fast import TrainConfig
    from agd_fast.demo import run_demo

    run_demo(tmp_path, samples=100, timing_rounds=2, train_config=TrainConfig(steps=20), progress=False)
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["adapter"]) == {"kind", "parameters", "fraction", "calibrated"}
    assert set(report["arms"]) == {"unguided", "cfg", "agd"}
    for arm in report["arms"].values():
        assert {"nfe", "seconds_per_image", "frechet_distance", "class_accuracy", "precision", "recall"} <= set(arm)
        assert all(isinstance(value, float) for value in arm.values())
    assert set(report["rmse_to_cfg"]) == {"agd", "unguided"}
    assert set(report["by_scale"]) == {"1.5", "2", "3", "4", "6"}
    assert set(report["seconds"]) == {"collect", "train", "evaluate", "total"}
    assert {"guidance_scale", "steps", "guidance_explained", "speedup_over_cfg", "environment", "bars"} <= set(report)
    assert "data:image/png;base64," in (tmp_path / "report.html").read_text()
    for name in ("grid.png", "curve.png"):
        Image.open(tmp_path / name).verify()


def test_no_name_of_the_package_hides_a_file_of_it():
    for found in pkgutil.iter_modules(cli.__path__):
        assert import_module(f"agd_fast.cli.{found.name}") is getattr(cli, found.name)


def test_version():
    done = CliRunner().invoke(app, "--version")
    assert done.exit_code == 0 and done.output == f"agd-fast {agd_fast.__version__}\n"


def test_help_of_distill_says_what_there_is():
    said = " ".join(CliRunner().invoke(app, ["distill", "--help"], env={"COLUMNS": "300"}).output.split())
    assert f"Settings that go together: {', '.join(PRESETS)}." in said
    assert "[default: (1 6, or 1 12 for prompts or inputs)]" in said


TEXT = ["--model", "nowhere", "--prompts"]
HERE = Path(__file__)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["distill", *TEXT, "none.txt"], "found no file none.txt"),
        (["distill", *TEXT, "empty.txt"], "at least one prompt in empty.txt"),
        (["distill", *TEXT, "latin.txt"], "latin.txt is not a text in UTF-8"),
        (["distill", *TEXT, HERE, "--labels", 1], "expected one of --prompts, --inputs, --labels; found --prompts and --labels"),
        (["distill", *TEXT, HERE, "--call", "{bad"], "expected JSON"),
        (["distill", *TEXT, HERE, "--kind", "foo"], "kind must be one of"),
        (["distill", *TEXT, HERE, "--guidance", 5, 2], "guidance_range must be (low, high)"),
        (["distill", *TEXT, HERE, "--sampling-steps", 8, 3], "expected --sampling-steps LOWEST HIGHEST, found 8 3"),
        (["distill", *TEXT, HERE, "--memory", "foo"], "memory must be one of"),
        (["distill", *TEXT, HERE, "--base-weights", "foo"], "base_weights must be one of"),
        (["distill", *TEXT, HERE, "--mixed-precision", "foo"], "mixed_precision must be one of"),
        (["distill", *TEXT, HERE, "--source", "foo"], "source must be one of"),
        (["distill", *TEXT, HERE, "--init", "none"], "expected adapter_config.json"),
        (["distill", "--prompts", HERE], "--prompts go(es) with a pipeline; expected --model as well"),
        (["sample", "none", "--model", "nowhere", "--prompt", "a"], "expected adapter_config.json"),
        (["sample", "none", "--model", "nowhere", "--inputs", "none.jsonl"], "found no file none.jsonl"),
        (["sample", "none", "--prompt", "a"], "--prompt go(es) with a pipeline; expected --model as well"),
        (["evaluate", "none", *TEXT, HERE], "expected adapter_config.json"),
        (["evaluate", "none", *TEXT, "none.txt"], "found no file none.txt"),
        (["evaluate", "none", *TEXT, HERE, "--metrics", "foo"], "expected metrics of lpips, clip, fid; found foo"),
        (["evaluate", "none", "--model", "nowhere"], "expected --prompts, --inputs or --labels"),
        (["estimate", "nowhere", "--kind", "foo"], "kind must be one of"),
        (["estimate", "nowhere", "--base-weights", "foo"], "base_weights must be one of"),
        (["convert", "none.pt", "--config", HERE, "--model", "nowhere"], "'none.pt' does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"ein M\xe4dchen")
    done = CliRunner().invoke(app, [*map(str, options)], env={"COLUMNS": "300"})
    assert message in " ".join(done.output.replace("│", " ").split()) + str(done.exception)


@pytest.mark.parametrize("command", ["demo", "distill", "sample", "evaluate", "info"])
def test_help(command):
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0 and "Usage" in done.output


def test_errors_are_one_line_without_a_traceback(tmp_path):
    done = run("sample", tmp_path / "nothing", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "adapter_config.json" in " ".join(done.stderr.split())


def test_parse_labels():
    assert parse_labels("0-2") == [0, 1, 2]
    assert parse_labels("1,5, 7-8") == [1, 5, 7, 8]
    for wrong in ("", "a", "3-1"):
        with pytest.raises(Exception, match="expected labels"):
            parse_labels(wrong)


def test_messages_with_brackets_and_warnings_are_printed_as_they_are(distilled, tmp_path):
    done = run("info", "[/nowhere]", check=False)
    assert done.returncode == 1
    assert "[/nowhere]" in done.stderr
    done = run("sample", distilled, "--output", tmp_path / "a.png", "--guidance", 20, "--steps", 2, "--labels", 1)
    assert "warning: guidance scale ω from 20 to 20 lies outside [1, 6]" in done.stderr
    assert "UserWarning" not in done.stderr
    assert run("sample", distilled, "--output", tmp_path / "a.jpg", check=False).returncode == 2
