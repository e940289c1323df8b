"""The embedded default: what ships is what its script makes, and guidance matters for it."""

import importlib.util
from pathlib import Path

import pytest
import torch

import agd_fast as agd
from agd_fast.datasets.digits import ASSETS
from agd_fast.files import read_json


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "bench" / "train_digits.py"
    spec = importlib.util.spec_from_file_location("train_digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_teacher_is_the_script_s_model(script):
    teacher = agd.datasets.digits_teacher()
    assert type(teacher.denoiser).__name__ == "DiTTransformer2DModel"
    made = {name: value for name, value in script.make_scheduler().config.items() if not name.startswith("_")}
    assert {name: teacher.scheduler.config[name] for name in made} == made
    images, labels = agd.datasets.digits_images()
    fresh = script.train_teacher(images, labels, seed=0, steps=1)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in teacher.denoiser.state_dict().items()}


def test_train_teacher_is_reproducible_from_its_seed(script):
    images, labels = agd.datasets.digits_images()
    first, second = (script.train_teacher(images, labels, seed=3, steps=3).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = script.train_teacher(images, labels, seed=4, steps=3).state_dict()
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_digits_classifier_reads_the_held_out_digits():
    images, labels = agd.datasets.digits_images()
    assert images.shape == (1797, 1, 8, 8) and images.min() == -1 and images.max() == 1
    classifier = agd.datasets.digits_classifier()
    assert classifier.features(images).shape == (1797, classifier.num_features)
    assert (classifier(images).argmax(1) == labels).float().mean() > 0.98
    assert read_json(ASSETS / "training.json")["classifier_accuracy"] >= 0.98


def test_guidance_matters_for_the_digits_teacher():
    """CFG repairs what unguided sampling gets wrong."""
    teacher, classifier = agd.datasets.digits_teacher(), agd.datasets.digits_classifier()
    labels = torch.arange(200) % 10
    right = {}
    for scale in (1.0, 3.0):
        images = agd.sample(teacher, labels, guidance_scale=scale, steps=15, seed=0)
        right[scale] = (classifier(images).argmax(1) == labels).float().mean().item()
    assert right[1.0] < 0.85 and right[3.0] > 0.97


def test_assets_fit_the_wheel():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 1_500_000
