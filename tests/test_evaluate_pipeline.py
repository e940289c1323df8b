"""One pass against two through a pipeline's own call: which pictures are made, what is measured of them, what is written."""

import json
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import agd_fast as agd
from agd_fast.attaching import require_attachment
from agd_fast.evaluation import frechet_distance
from helpers_evaluation import SIZE, colours, evaluate, lightness, mean_psnr, mean_ssim, read, save_clip, with_adapter
from tiny import FAMILIES
from tiny.text import prompts

NUMBERS = range(5)  # of three prompts
REAL = ((250, 3, 80), (9, 200, 120), (60, 60, 255), (128, 90, 30), (5, 240, 7))  # pictures of one colour, however they are cut


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, clip):
    """An evaluation with all that can be asked for: (result, folder)."""
    folder = tmp_path_factory.mktemp("evaluation")
    real = folder / "real"
    real.mkdir()
    for number, colour in enumerate(REAL):
        Image.new("RGB", (20 + number, 18), colour).save(real / f"{number}.png")
    metrics = {"lpips": lightness, "clip": clip, "fid": colours}
    settings = {"samples": len(NUMBERS), "explained_prompts": 2, "timing_rounds": 2, "metrics": metrics, "real": real}
    return evaluate(with_adapter(), folder, prompts=prompts(3), call=SIZE, **settings), folder


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in sorted((folder / "pictures").rglob("*.png"))}


def contents(folder):
    return {name: path.read_bytes() for name, path in files(folder).items()}


# pictures


def test_pictures_are_those_of_the_pipelines_own_call_whatever_is_made_together(done):
    _, folder = done
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["agd-2", "agd-4", "cfg-2", "cfg-4", "unguided"]
    base, adapted = FAMILIES["sd15"].pipeline(), with_adapter()
    for way, pipe, scale in (("unguided", base, 1.0), ("cfg-4", base, 4.0), ("agd-4", adapted, 4.0), ("agd-2", adapted, 2.0)):
        found = read(folder, way, NUMBERS)
        assert len({picture.tobytes() for picture in found}) == len(NUMBERS)  # the same prompt again has other noise
        for number in (1, 4):  # both of the second prompt, in two calls
            generator = torch.Generator().manual_seed(number)
            call = {"guidance_scale": scale, "generator": generator, "num_inference_steps": 2, **SIZE}
            expected = np.array(pipe(prompts(3)[1], **call).images[0]) / 255
            assert np.abs(found[number] - expected).max() < 1.5 / 255


def test_an_interrupted_evaluation_goes_on(tmp_path):
    whole = evaluate(with_adapter(), tmp_path / "whole", batch_size=2)
    pipe, forwards = with_adapter(), []

    def stop_after(count):
        def note(*_):
            forwards.append(None)
            if len(forwards) == count:
                raise KeyboardInterrupt

        return pipe.unet.register_forward_pre_hook(note)

    hook = stop_after(16)  # 6 of what is counted, 4 unguided, 4 of CFG, 2 of the adapter
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, tmp_path / "stopped", batch_size=2)
    hook.remove()
    there = {name: path.stat().st_mtime_ns for name, path in files(tmp_path / "stopped").items()}
    assert len(there) == 6 and not list((tmp_path / "stopped").rglob(".*.partial"))
    forwards.clear()
    hook = stop_after(None)
    result = evaluate(pipe, tmp_path / "stopped", batch_size=2)
    assert len(forwards) == 6 + 3 * 4
    hook.remove()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert {name: files(tmp_path / "stopped")[name].stat().st_mtime_ns for name in there} == there
    assert result.by_scale == whole.by_scale


def test_pictures_of_another_evaluation_are_neither_taken_nor_deleted_unasked(tmp_path):
    pipe = with_adapter()
    evaluate(pipe, tmp_path, guidance_scales=[2.0], count=2)
    before = contents(tmp_path)
    for changes, named in (
        ({"steps": 3}, "steps: expected 3, found 2"),
        ({"seed": 1}, "seed: expected 1, found 0"),
        ({"inputs": {"prompt": ["a lamp", "a ship"]}}, "inputs.prompt"),
        ({"call": {**SIZE, "guidance_rescale": 0.5}}, "call: expected .*guidance_rescale=0.5"),
    ):
        with pytest.raises(ValueError, match=rf"pictures of another evaluation \({named}.*resume=False"):
            evaluate(pipe, tmp_path, **{"guidance_scales": [2.0], "count": 2, **changes})
    for module, named in ((require_attachment(pipe.unet).adapter, "adapters.unet"), (pipe.unet, "denoisers.unet")):
        weight = next(module.parameters()).data
        weight.mul_(2)
        with pytest.raises(ValueError, match=rf"another evaluation \({named}"):
            evaluate(pipe, tmp_path, guidance_scales=[2.0], count=2)
        weight.div_(2)
    assert contents(tmp_path) == before
    evaluate(pipe, tmp_path, guidance_scales=[2.0], count=2, seed=1, resume=False)
    assert contents(tmp_path).keys() == before.keys() and contents(tmp_path) != before


def test_further_scales_and_pictures_join_those_that_are_there(tmp_path):
    pipe = with_adapter()
    evaluate(pipe, tmp_path, guidance_scales=[2.0], count=2)
    before = {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()}
    evaluate(pipe, tmp_path, guidance_scales=[3.0, 2.0], count=2, samples=3)
    after = {name: path.stat().st_mtime_ns for name, path in files(tmp_path).items()}
    assert len(before) == 6 and len(after) == 15 and before.items() < after.items()


def test_a_black_picture_leaves_its_number_out(tmp_path):
    pipe = with_adapter()
    evaluate(pipe, tmp_path)
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "agd-4" / "00001.png")
    with pytest.warns(UserWarning, match="1 of 3 are left out, as a picture of theirs is black"):
        result = evaluate(pipe, tmp_path)
    assert result.left_out == 1 and result.black == {"agd-4": 1}
    assert "1 of them left out as black (agd-4: 1)" in (tmp_path / "report.html").read_text()
    kept = [read(tmp_path, way, (0, 2)) for way in ("agd-2", "cfg-2")]
    assert result.by_scale["2"].arms["agd"].rmse == pytest.approx(np.sqrt(np.mean((kept[0] - kept[1]) ** 2)), rel=1e-5)
    Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "cfg-2" / "00000.png")
    with pytest.warns(UserWarning, match="2 of 3 are left out"):
        result = evaluate(pipe, tmp_path, metrics={"fid": colours})
    assert result.by_scale["2"].arms["agd"].frechet_to_cfg is None  # of one picture
    for number in (0, 2):
        Image.new("RGB", (16, 16)).save(tmp_path / "pictures" / "cfg-2" / f"{number:05d}.png")
    with pytest.raises(ValueError, match=r"black all over for each of 3 inputs \(2 of cfg-2, 1 of agd-4\): .*not finite"):
        evaluate(pipe, tmp_path)


def test_pictures_of_several_sizes_are_compared_each_with_its_own(tmp_path):
    base = with_adapter()
    pipe = agd.share(base, StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False))
    rows = {"prompt": prompts(3), "image": [Image.new("RGB", size, "red") for size in ((16, 24), (24, 16), (16, 16))]}
    result = evaluate(pipe, tmp_path, inputs=rows, call={}, guidance_scales=[2.0], steps=4, metrics={"fid": colours})
    assert [picture.size for picture in map(Image.open, files(tmp_path).values())][:3] == [(16, 24), (24, 16), (16, 16)]
    scores = result.by_scale["2"].arms["agd"]
    assert scores.rmse > 0 and scores.frechet_to_cfg is not None
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (180 + 3 * (96 + 6), 24 + 3 * (96 + 6))


# what is measured


def test_scores_are_those_of_the_pictures_on_disk(done):
    result, folder = done
    real = torch.tensor(REAL) / 255
    for scale in ("2", "4"):
        arms = result.by_scale[scale].arms
        target = read(folder, f"cfg-{scale}", NUMBERS)
        for arm, way in (("unguided", "unguided"), ("agd", f"agd-{scale}"), ("cfg", f"cfg-{scale}")):
            pictures, scores = read(folder, way, NUMBERS), arms[arm]
            features = torch.tensor(pictures.mean(axis=(1, 2)))
            assert scores.frechet_to_real == pytest.approx(frechet_distance(real, features), rel=1e-4)
            if arm == "cfg":
                assert scores.rmse is scores.psnr is scores.ssim is scores.lpips is scores.frechet_to_cfg is None
                continue
            assert scores.rmse == pytest.approx(np.sqrt(np.mean((pictures - target) ** 2)), rel=1e-5)
            assert scores.psnr == pytest.approx(mean_psnr(pictures, target), rel=1e-5)
            assert scores.ssim == pytest.approx(mean_ssim(pictures, target), rel=1e-4)
            lighter = np.abs(pictures.mean(axis=(1, 2, 3)) - target.mean(axis=(1, 2, 3))).mean()
            assert scores.lpips == pytest.approx(lighter, rel=1e-4)
            of_target = torch.tensor(target.mean(axis=(1, 2)))
            assert scores.frechet_to_cfg == pytest.approx(frechet_distance(of_target, features), rel=1e-3)
    assert result.by_scale["4"].arms["unguided"].rmse > result.by_scale["2"].arms["unguided"].rmse


def test_clip_scores_pictures_with_their_own_prompts(done, clip):
    result, folder = done
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for way, arm in (("unguided", "unguided"), ("cfg-2", "cfg"), ("agd-2", "agd")):
        found = []
        for number in NUMBERS:
            picture = Image.open(folder / "pictures" / way / f"{number:05d}.png")
            given = processor(text=[prompts(3)[number % 3]], images=[picture], return_tensors="pt")
            with torch.no_grad():
                found.append(float(model(**given).logits_per_image) / float(model.logit_scale.exp()) * 100)
        assert result.by_scale["2"].arms[arm].clip == pytest.approx(np.mean(np.maximum(found, 0)), rel=1e-3)
    assert result.networks == {"lpips": "lightness", "clip": clip, "fid": "colours"}


def test_evaluations_are_counted_and_guidance_explained_is_that_of_its_own_function(done):
    from agd_fast.evaluation import guidance_explained
    from agd_fast.pipelines import PipelineTeacher

    result, _ = done
    assert {arm: cost.nfe for arm, cost in result.costs.items()} == {"unguided": 2.0, "cfg": 4.0, "agd": 2.0}
    assert all(cost.seconds > 0 and cost.timing.rounds == 2 and cost.peak_bytes is None for cost in result.costs.values())
    teacher = PipelineTeacher.of(with_adapter(), inputs={"prompt": prompts(2)}, call=SIZE)
    expected = guidance_explained(teacher, teacher.conditions(), scales=(2.0, 4.0), steps=2, seed=1)
    for scale in (2.0, 4.0):
        found = result.by_scale[f"{scale:g}"]
        assert found.guidance_explained == {"unet": pytest.approx(expected.by_scale[scale], rel=1e-4)}
        assert found.guidance_strength == {"unet": pytest.approx(expected.strength_by_scale[scale], rel=1e-4)}
    assert result.by_scale["2"].closeness > 0


def test_the_engine_runs_in_an_evaluation_too(tmp_path):
    pipe = with_adapter("dit")
    agd.optimize(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that it runs as it is
        result = evaluate(pipe, tmp_path, FAMILIES["dit"], 1, guidance_scales=[2.0])
    assert (result.costs["cfg"].nfe, result.costs["agd"].nfe) == (4.0, 2.0)
    assert agd.info(pipe)["engine"]["captured"]


def test_a_report_is_written(done):
    result, folder = done
    report = json.loads((folder / "report.json").read_text())
    assert report == json.loads(json.dumps(result.to_dict()))
    assert report["by_scale"]["4"]["arms"]["agd"]["psnr"] > 0 and report["costs"]["agd"]["nfe"] == 2
    assert {"seconds", "environment", "networks", "speedup_over_cfg"} <= report.keys()
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page and "Fréchet to real" in page and "None" not in page
    with Image.open(folder / "grid.png") as grid:
        tile = 96 + 6
        assert grid.size == (180 + 5 * tile, 24 + 5 * tile)
        for column, way in enumerate(("unguided", "cfg-2", "agd-2", "cfg-4", "agd-4")):
            corner = (180 + column * tile, 24 + 2 * tile)
            drawn = grid.crop((*corner, corner[0] + 96, corner[1] + 96)).resize((16, 16), Image.Resampling.NEAREST)
            assert np.array_equal(np.array(drawn) / 255, read(folder, way, [2])[0])


# pipelines


def test_classes_videos_and_two_denoisers(tmp_path):
    for name, scale in (("dit", 4.0), ("wan22", 4.0)):
        result = evaluate(
            with_adapter(name), tmp_path / name, FAMILIES[name], 2, guidance_scales=[scale], explained_prompts=1, batch_size=2
        )
        assert (result.costs["cfg"].nfe, result.costs["agd"].nfe) == (4.0, 2.0)
        assert result.by_scale["4"].arms["agd"].rmse > 0
    assert list(result.adapters) == list(result.by_scale["4"].guidance_explained) == ["transformer", "transformer_2"]


def test_a_pipeline_of_sound_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found a StableAudioPipeline that makes none"):
        evaluate(with_adapter("stable_audio"), tmp_path, FAMILIES["stable_audio"], 1)


def test_embeddings_of_a_negative_prompt_are_for_cfg_alone(tmp_path):
    pipe = with_adapter()
    embeds, negative = pipe.encode_prompt(prompts(2), "cpu", 1, True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(pipe, tmp_path / "embeddings", inputs={"prompt_embeds": embeds, "negative_prompt_embeds": negative})
    evaluate(pipe, tmp_path / "prompts", count=2)
    assert contents(tmp_path / "embeddings") == contents(tmp_path / "prompts")


def test_a_scale_by_which_the_pipeline_does_not_guide_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"guidance_scales above 1, which is no guidance; found \[4.0, 1.0\]"):
        evaluate(with_adapter("cosmos"), tmp_path, FAMILIES["cosmos"], guidance_scales=[4.0, 1.0])
    taught_by_a_guider = with_adapter("cosmos", guidance_range=(1.0, 2.0))
    with pytest.raises(ValueError, match=r"guidance_scales above 1, which is no guidance; found \[0.5\]"):
        evaluate(taught_by_a_guider, tmp_path, FAMILIES["cosmos"], guidance_scales=None)


def test_a_negative_prompt_that_an_adapter_has_not_learnt_is_said(tmp_path):
    with pytest.warns(UserWarning, match="the negative prompt is left out"):
        evaluate(with_adapter(), tmp_path, count=1, call={**SIZE, "negative_prompt": "pale lamp"})


# what is refused


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": None}, ValueError, "expected prompts, or inputs, .* found neither"),
        ({"prompts": "nowhere.txt"}, FileNotFoundError, "found no file nowhere.txt"),
        ({"guidance_scales": [4.0, 1.0]}, ValueError, r"guidance_scales above 1, which is no guidance; found \[4.0, 1.0\]"),
        ({"metrics": ["lpips", "is"]}, ValueError, "expected metrics of lpips, clip, fid; found is"),
        ({"real": "."}, ValueError, r"expected 'fid' among metrics, .*; found \[\]"),
        ({"real": "nowhere", "metrics": {"fid": colours}}, FileNotFoundError, r"real pictures \(.*\), found 0 in nowhere"),
        ({"count": 1, "metrics": {"fid": colours}}, ValueError, r"at least 2 an arm \(samples\), found 1"),
        ({"metrics": {"fid": "nowhere.pth"}}, FileNotFoundError, "file with its weights; found no file nowhere.pth"),
        ({"metrics": {"clip": "./nowhere"}}, OSError, "a CLIP of transformers, by its folder or Hub id; found './nowhere'"),
        (
            {"metrics": ["clip"], "inputs": {"prompt_embeds": torch.zeros(1, 16, 16)}},
            ValueError,
            "expected prompts, found inputs without any",
        ),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_runs(changes, error, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", type(sys)("torch_fidelity"))
    with pytest.raises(error, match=message):
        evaluate(with_adapter(), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("metric", "module", "package"),
    [
        ("lpips", "torchvision", "torchvision"),
        ("clip", "transformers", "transformers"),
        ("fid", "torch_fidelity", "torch-fidelity"),
    ],
)
def test_a_missing_package_is_named(metric, module, package, tmp_path, monkeypatch):
    pipe = with_adapter()
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=rf"{metric} expects the package {package} \(pip install 'agd-fast\[evaluate\]'\)"):
        evaluate(pipe, tmp_path, metrics=[metric])


def test_a_pipeline_without_adapter_is_refused(pipe, tmp_path):
    with pytest.raises(ValueError, match="no adapter"):
        evaluate(pipe, tmp_path)
