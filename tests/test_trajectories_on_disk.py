"""A folder of trajectories: the same bytes each time, what continues it after a kill, and what it refuses."""

import json
import shutil
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from agd_fast.files import read_json, write_json
from agd_fast.trajectories import Trajectories
from helpers_distillation import after_calls, collect_tiny, contents, kill_in_child, kill_self, tiny_teacher


@pytest.fixture
def copied(trajectories, folder, tmp_path):
    """A folder of finished trajectories to damage."""
    return shutil.copytree(folder, tmp_path / "copied")


def test_collect_twice_gives_the_same_bytes(tmp_path, folder, trajectories):
    torch.manual_seed(5)  # the caller's random numbers do not matter
    collect_tiny(tmp_path)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_collect_remakes_one_shard_alone(copied, folder, index, written):
    name = f"shard-{index:05d}.safetensors"
    manifest = read_json(copied / "manifest.json")
    del manifest["files"][name]
    write_json(copied / "manifest.json", manifest)
    if not written:  # a kill may come between a shard and its entry
        (copied / name).unlink()
    teacher, calls = tiny_teacher(), []
    teacher.denoiser.register_forward_hook(lambda *_: calls.append(1))
    collect_tiny(copied, teacher)
    files, expected = contents(copied), contents(folder)
    found, wanted = (json.loads(part.pop("manifest.json")) for part in (files, expected))
    assert (files, found) == (expected, wanted)
    assert len(calls) == 4


def test_collect_again_does_nothing(copied, folder):
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 1, partial(pytest.fail, "the denoiser ran"))
    collect_tiny(copied, teacher)
    assert contents(copied) == contents(folder)


def killed_in_a_forward(directory):
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 7, kill_self)  # the second of three shards
    collect_tiny(directory, teacher)


def killed_in_a_write(directory, ending):
    """Half of the second file with this ending, then SIGKILL."""
    import agd_fast.files

    written, whole = [], agd_fast.files.save_file

    def save_half(tensors, path, metadata):
        whole(tensors, path, metadata)
        written.append(path)
        if path.name == f".{ending}.partial":
            path.write_bytes(path.read_bytes()[:100])
            kill_self()

    agd_fast.files.save_file = save_half
    collect_tiny(directory)


def test_collect_continues_after_a_kill_in_a_forward(tmp_path, folder, trajectories):
    kill_in_child(killed_in_a_forward, tmp_path)
    assert sorted(read_json(tmp_path / "manifest.json")["files"]) == ["shard-00000.safetensors"]
    with pytest.raises(ValueError, match="unfinished: expected 3 shards, found 1"):
        Trajectories(tmp_path)
    teacher, calls = tiny_teacher(), []
    teacher.denoiser.register_forward_hook(lambda *_: calls.append(1))
    collect_tiny(tmp_path, teacher)
    assert len(calls) == 8  # two shards
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "shard-00001.safetensors"])
def test_collect_continues_after_a_kill_in_a_write(tmp_path, folder, trajectories, name):
    kill_in_child(killed_in_a_write, tmp_path, name)
    assert (tmp_path / f".{name}.partial").stat().st_size == 100
    assert not (tmp_path / name).exists()
    collect_tiny(tmp_path)
    assert contents(tmp_path) == contents(folder)


def truncated(path, other):
    path.write_bytes(path.read_bytes()[:-1])


def bit_flipped(path, other):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def missing(path, other):
    path.unlink()


def foreign(path, other):
    shutil.copy(other / path.name, path)


def foreign_and_unlisted(path, other):
    shutil.copy(other / path.name, path)
    manifest = read_json(path.parent / "manifest.json")
    del manifest["files"][path.name]
    write_json(path.parent / "manifest.json", manifest)


def truncated_and_unlisted(path, other):
    foreign_and_unlisted(path, other)
    truncated(path, other)


@pytest.mark.parametrize("damage", [foreign, foreign_and_unlisted])
def test_collect_and_trajectories_name_a_foreign_file(tmp_path, copied, damage):
    path = copied / "shard-00001.safetensors"
    collect_tiny(tmp_path / "other", seed=1, labels=[2, 1, 0])
    damage(path, tmp_path / "other")
    before = contents(copied)
    for read in (collect_tiny, Trajectories):
        with pytest.raises(ValueError, match=f"{path} is (corrupted|foreign)"):
            read(copied)
    assert contents(copied) == before


@pytest.mark.parametrize("damage", [truncated, bit_flipped, missing, truncated_and_unlisted])
def test_collect_makes_a_damaged_file_again_and_trajectories_name_it(copied, folder, damage):
    path, listed = copied / "shard-00001.safetensors", damage is not truncated_and_unlisted
    damage(path, folder)
    with pytest.raises(ValueError, match=f"{path} is (corrupted|listed).*; collect again to make it anew|is unfinished"):
        Trajectories(copied)
    with pytest.warns(UserWarning, match=f"{path} is .*; it is collected again") if listed else nullcontext():
        collect_tiny(copied)
    found, expected = contents(copied), contents(folder)
    assert json.loads(found.pop("manifest.json")) == json.loads(expected.pop("manifest.json"))
    assert found == expected


def test_collect_refuses_foreign_files_in_a_new_folder(tmp_path, folder, trajectories):
    shutil.copy(folder / "shard-00001.safetensors", tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}/shard-00001.safetensors is foreign"):
        collect_tiny(tmp_path, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "format_version None; expected 2"),
        ('{"format_version": 3}', "format_version 3; expected 2"),
        ('{"format_version": 2}', "lacks the entries"),
    ],
)
def test_collect_and_trajectories_name_a_damaged_manifest(copied, content, message):
    (copied / "manifest.json").write_text(content)
    for read in (collect_tiny, Trajectories):
        with pytest.raises(ValueError, match=f"{copied / 'manifest.json'} .*{message}"):
            read(copied)


@pytest.mark.parametrize(
    "damage",
    [
        {"plan": None},
        {"plan": {}},
        {"plan_id": 3},
        {"files": []},
        {"files": {"shard-00000.safetensors": 3}},
        {"files": {"shard-00000.safetensors": {"rows": 8, "bytes": "8", "sha256": ""}}},
        {"files": {"../shard-00000.safetensors": {"rows": 8, "bytes": 8, "sha256": ""}}},
    ],
)
def test_collect_and_trajectories_name_a_manifest_of_other_types(copied, damage):
    write_json(copied / "manifest.json", {**read_json(copied / "manifest.json"), **damage})
    for read in (collect_tiny, Trajectories):
        with pytest.raises(ValueError, match=f"{copied / 'manifest.json'} is damaged: expected .*; remove it to collect again"):
            read(copied)


def test_trajectories_name_a_folder_without_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected a manifest.json in {tmp_path}"):
        Trajectories(tmp_path)


@pytest.mark.parametrize(
    ("change", "entries"),
    [
        ({"seed": 7}, ["seed: expected 7, found 0"]),
        ({"guidance_range": (1, 12)}, ["guidance_range"]),
        ({"steps": (4, 5), "keep": 2}, ["steps", "keep: expected 2, found None"]),
        ({"trajectories": 6}, ["trajectories: expected 6, found 5"]),
        ({"dtype": torch.float16}, ["dtype: expected 'float16', found 'float32'"]),
        ({"labels": [0, 1, 1]}, ["conditions.class_labels"]),
        ({"source": "data", "data": (torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long))}, ["source", "data"]),
        ({"teacher": tiny_teacher(seed=1)}, ["model.hash"]),
    ],
)
def test_collect_names_what_differs_from_the_plan_in_the_folder(copied, folder, change, entries):
    with pytest.raises(ValueError, match="holds other trajectories") as error:
        collect_tiny(copied, **change)
    assert all(f"{entry}" in str(error.value) for entry in entries)
    assert "prediction_type" not in str(error.value)
    assert contents(copied) == contents(folder)


def test_collect_goes_on_with_a_scheduler_of_infinite_settings(tmp_path):
    """JSON has no number for them."""
    teacher = tiny_teacher()
    teacher.scheduler = DPMSolverMultistepScheduler(prediction_type="v_prediction")
    assert teacher.scheduler.config.lambda_min_clipped == float("-inf")
    collect_tiny(tmp_path, teacher)
    before = contents(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="collected again"):
        collect_tiny(tmp_path, teacher)
    assert json.loads(contents(tmp_path)["manifest.json"]) == json.loads(before["manifest.json"])


def test_collect_names_another_scheduler(copied):
    teacher = tiny_teacher()
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config, beta_end=0.03)
    with pytest.raises(ValueError, match=r"scheduler.beta_end: expected 0.03, found 0.02"):
        collect_tiny(copied, teacher)
