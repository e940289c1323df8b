"""200 steps of distillation explain some of the guidance of every family, on noise and scales that were not trained on."""

import json

import pytest
import torch
from PIL import Image

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from helpers_families import denoisers, run, to_distil, watched
from tiny import FAMILIES

SETTINGS = {"trajectories": 24, "hidden": 8, "learning_rate": None, "batch_size": 8}
HARD = {"trajectories": 96, "hidden": 4, "learning_rate": 5e-3}  # guidance is weak there: 24 trajectories are learnt by heart
SLOW = {"batch_size": 4}
OF_FAMILY = {
    "animatediff": {**SLOW, "trajectories": 40, "hidden": 4, "learning_rate": 1e-2},
    "audioldm": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "audioldm2": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "auraflow": HARD,
    "deepfloyd_if": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "easyanimate": SLOW,
    "hunyuan_image": SLOW,
    "hunyuanvideo15": SLOW,
    "kandinsky22": {**SLOW, "trajectories": 48, "hidden": 4, "learning_rate": 5e-3},
    "kandinsky3": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "lumina2": HARD,
    "motif_video": SLOW,
    "sana_video": SLOW,
    "sd15": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "sdxl": {**HARD, **SLOW},
    "unet3d": {**SLOW, "hidden": 4, "learning_rate": 1e-2},
    "zimage": SLOW,  # whose samples are predicted one by one
}
WITHOUT_PICTURES = (
    "audioldm",
    "audioldm2",
    "kandinsky_prior",
    "longcat_audio",
    "stable_audio",
    "stable_audio3",
    "stable_cascade_prior",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_distilling_a_pipeline_explains_its_guidance(name, tmp_path):
    family, settings = FAMILIES[name], {**SETTINGS, **OF_FAMILY.get(name, {})}
    pipe = family.pipeline()
    result = agd.distill(
        pipe,
        output_dir=tmp_path,
        **to_distil(pipe, family),
        adapter=agd.AdapterConfig(hidden=settings["hidden"]),
        trajectories=settings["trajectories"],
        sampling_steps=4,
        train_config=TrainConfig(
            steps=200, batch_size=settings["batch_size"], learning_rate=settings["learning_rate"], log_every=20
        ),
        validation=4,
        progress=False,
    )
    names = list(denoisers(pipe))
    assert list(result.others) == names[1:]
    for one in (result, *result.others.values()):
        losses = [json.loads(line)["loss"] for line in (one.output_dir / "log.jsonl").read_text().splitlines()]
        assert len(losses) == 10
        assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
        assert one.loss == losses[-1]
        assert one.explained.mean > 0.1
        assert json.loads((one.output_dir / "distill.json").read_text())["guidance_explained"]["mean"] == one.explained.mean
        about = json.loads((one.output_dir / "adapter_config.json").read_text())["about"]
        assert about["pipeline"] == type(pipe).__name__
        assert about["guidance_explained"] == one.explained.mean
    picture = tmp_path / "samples.png"
    assert picture.is_file() != (name in WITHOUT_PICTURES)
    if picture.is_file():
        with Image.open(picture) as image:
            assert image.width == image.height  # three inputs wide, three arms high
    with watched(pipe) as found:
        run(pipe, family, **family.guided)
    assert [[forward.size for forward in step] for step in found.steps] == [[2]] * 4
    fresh = agd.load(family.pipeline(), tmp_path)
    assert all(attachment_of(denoiser) is not None for denoiser in denoisers(fresh).values())
    assert torch.equal(run(fresh, family, **family.guided), run(pipe, family, **family.guided))
