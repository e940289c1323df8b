"""The command line on pipelines of diffusers that lie in folders, and on the Hub."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from typer.testing import CliRunner

from agd_fast.cli import app
from agd_fast.cli.reading import load_model
from fake_hub import TOKEN, FakeHub
from helpers_evaluation import save_clip
from helpers_reference import ASSETS, make_base
from tiny import FAMILIES

SHORT = ["--trajectories", "8", "--sampling-steps", "2", "3", "--steps", "4", "--batch-size", "4", "--hidden", "2", "--quiet"]
CALL = json.dumps({"height": 16, "width": 16})


def run(*arguments, check=True):
    done = CliRunner().invoke(app, [*map(str, arguments)])
    if check:
        assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A folder with a StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("sd15")
    FAMILIES["sd15"].pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def distilled(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distilled")
    prompts = folder / "prompts.txt"
    prompts.write_text("a red fox\n\n  a boat on a lake  \na bowl of fruit\n")
    output = folder / "run"
    options = ["--model", pipeline, "--prompts", prompts, "--call", CALL, "--validation", 2, "--validate-every", 2]
    done = run("distill", "--output", output, *options, "--calibrate", *SHORT)
    assert re.search(rf" explain -?\d+\.\d% of the guidance, strength -?\d+\.\d\d; written to {output}", done.output)
    return output


def test_distill_follows_a_pipeline(distilled):
    config = json.loads((distilled / "adapter_config.json").read_text())
    assert config["base_class"] == "UNet2DConditionModel"
    assert config["about"]["pipeline"] == "StableDiffusionPipeline" and config["about"]["pipeline_tag"] == "text-to-image"
    assert config["about"]["call"] == "height=16, width=16"
    assert config["adapter"]["hidden"] == 2 and config["adapter"]["guidance_range"] == [1.0, 12.0]
    assert config["calibration"]["guidance_range"] == [1.0, 12.0]
    drawn = sorted(path.name for path in (distilled / "validation").iterdir())
    assert drawn == [f"step-00000{step}.{end}" for step in (2, 4) for end in ("json", "png")]
    assert Image.open(distilled / "samples.png").size == (3 * 16, 3 * 16)  # three prompts, three arms


def test_sample_draws_prompts(pipeline, distilled, tmp_path):
    picture = tmp_path / "fox.png"
    options = ["--model", pipeline, "--prompt", "a red fox", "--prompt", "a boat", "--call", CALL, "--steps", 2]
    run("sample", distilled, "--output", picture, *options, "--compare")
    assert Image.open(picture).size == (2 * 16, 3 * 16)
    done = run("sample", distilled, "--output", picture, *options, "--call", "[1]", check=False)
    assert done.exit_code == 2 and "expected a JSON object" in done.output


def test_sample_of_a_text_pipeline_expects_prompts(pipeline, distilled, tmp_path):
    done = run("sample", distilled, "--output", tmp_path / "a.png", "--model", pipeline, "--steps", 2, check=False)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and "a text pipeline expects --prompt or --inputs; found neither for StableDiffusionP" in said


def test_models_are_loaded_in_their_precision_without_a_word(pipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert load_model(str(pipeline), "bfloat16").unet.dtype == torch.bfloat16
        assert load_model("digits").denoiser.dtype == torch.float32


def test_evaluate_compares_an_adapter_with_its_pipeline(pipeline, distilled, tmp_path):
    prompts = tmp_path / "val.txt"
    prompts.write_text("a green house\na blue tree\n")
    output, clip = tmp_path / "eval", save_clip(tmp_path / "clip")
    options = ["--model", pipeline, "--prompts", prompts, "--call", CALL, "--steps", 2, "--output", output, "--rounds", 1]
    done = run("evaluate", distilled, *options, "--scales", "2,4", "--metrics", f"clip={clip}", "--batch-size", 1, "--quiet")
    assert "Guidance scale 4:" in done.output and "CLIP" in done.output and "NFE" in done.output
    assert {path.name for path in output.iterdir()} == {"grid.png", "pictures", "plan.json", "report.html", "report.json"}
    report = json.loads((output / "report.json").read_text())
    assert list(report["by_scale"]) == ["2", "4"] and report["pictures"] == 2 and report["networks"] == {"clip": clip}
    assert [cost["nfe"] for cost in report["costs"].values()] == [2, 4, 2] and report["costs"]["agd"]["batch"] == 1
    done = run("evaluate", distilled, *options, "--seed", 1, check=False)
    assert "seed: expected 1, found 0" in str(done.exception)
    run("evaluate", distilled, *options, "--seed", 1, "--fresh", "--quiet")
    assert list(json.loads((output / "report.json").read_text())["by_scale"]) == ["6.5"]  # the middle of 1 to 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scales", "2"], "--scales go(es) with a pipeline; expected --model"),
        (["--metrics", "clip"], "--metrics go(es) with a pipeline"),
        (["--model", "nowhere", "--scales", "2;3"], "guidance scales such as '5,7.5'"),
    ],
)
def test_evaluate_says_what_goes_with_a_pipeline(options, message, tmp_path):
    done = run("evaluate", tmp_path, *options, check=False)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())


def test_distill_names_a_file_of_prompts_that_is_not_there(pipeline, tmp_path):
    done = run("distill", "--output", tmp_path / "run", "--model", pipeline, "--prompts", tmp_path / "none.txt", check=False)
    assert isinstance(done.exception, FileNotFoundError) and "none.txt" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_push_and_info_by_repo(distilled, tmp_path, monkeypatch):
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert f"{hub.url}/me/sd15-agd" in run("push", distilled, "me/sd15-agd").output.replace("\n", "")
        assert {"adapter.safetensors", "adapter_config.json", "README.md", "samples.png"} <= set(hub.files("me/sd15-agd"))
        assert "UNet2DConditionModel" in run("info", "me/sd15-agd").output


def test_convert_writes_an_adapter(tmp_path, monkeypatch):
    base = tmp_path / "base"
    pipe = FAMILIES["sd15"].pipeline()
    pipe.register_modules(unet=make_base("unet-attention"))
    pipe.save_pretrained(base)
    case = ASSETS / "unet-attention"
    done = run("convert", case / "0005000.pt", "--config", case / "config.yaml", "--model", base, "--output", tmp_path / "out")
    assert "written to" in done.output
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["adapter"]["kind"] == "reference_cross_attention" and Path(tmp_path / "out" / "adapter.safetensors").is_file()
