"""A full disk, a read-only folder: an OSError that names the file, and nothing half-written."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.files import read_json, read_tensors
from agd_fast.trajectories import Trajectories
from helpers_distillation import (
    collect_tiny,
    contents,
    distill_tiny,
    file_size_limit,
    in_child,
    short,
    small,
    tiny_teacher,
)


def limited(size, function, *arguments, **settings):
    with file_size_limit(size):
        function(*arguments, **settings)


def save_random(directory, seed=0, hidden=4, note=""):
    teacher = tiny_teacher()
    torch.manual_seed(seed)
    adapter = agd.attach(teacher, small(hidden=hidden))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    return agd.save(teacher, directory, about={"note": note})


def distill_and_tell(directory, size, **settings):
    """The error, and whether the model was left without adapter and trainable."""
    teacher = tiny_teacher()
    try:
        with file_size_limit(size):
            distill_tiny(directory, teacher, **settings)
    except OSError as error:
        return str(error), attachment_of(teacher) is None and all(p.requires_grad for p in teacher.denoiser.parameters())
    raise AssertionError("expected an OSError")


def append_until_full(path):
    from agd_fast.files import append_text

    with file_size_limit(10):
        for _ in range(3):
            append_text(path, "12345678\n")


def test_collect_on_a_full_disk(tmp_path):
    """The shards of six trajectories fit, that of fifteen more does not."""
    with pytest.raises(OSError, match=f"could not write {tmp_path}/shard-00000.safetensors.*too large"):
        in_child(limited_collect, tmp_path, 2500)
    assert sorted(contents(tmp_path)) == ["manifest.json"]
    assert read_json(tmp_path / "manifest.json")["files"] == {}
    with pytest.raises(ValueError, match="unfinished"):
        Trajectories(tmp_path)
    assert len(limited_collect(tmp_path)) == 80  # there is room again


def limited_collect(directory, size=None):
    if size is None:
        return collect_tiny(directory, trajectories=20, shard_size=20)
    limited(size, collect_tiny, directory, trajectories=20, shard_size=20)


def test_save_on_a_full_disk_keeps_the_old_adapter(tmp_path):
    save_random(tmp_path)
    before = contents(tmp_path)
    for note, name in (("", "adapter.safetensors"), ("long " * 10_000, "adapter_config.json")):
        with pytest.raises(OSError, match=f"could not write {tmp_path}/{name}.*too large"):
            in_child(limited_save, tmp_path, 600 if not note else 40_000, note)
        assert contents(tmp_path) == before
    agd.load(tiny_teacher(), tmp_path)


def limited_save(directory, size, note=""):
    limited(size, save_random, directory, seed=1, note=note)


def test_save_on_a_full_disk_writes_nothing_new(tmp_path):
    with pytest.raises(OSError, match=f"could not write {tmp_path}/new/"):
        in_child(limited_save, tmp_path / "new", 600)
    assert contents(tmp_path) == {}


def test_distill_on_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    with pytest.raises(FloatingPointError):  # leaves a checkpoint of five steps behind
        distill_tiny(tmp_path, train_config=short(), trajectories=Exploding(tmp_path))
    before = contents(tmp_path)
    message, clean = in_child(distill_and_tell, tmp_path, before_size(tmp_path))
    assert f"could not write {tmp_path}/checkpoint.safetensors" in message
    assert clean
    assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "5"
    assert {name: value for name, value in contents(tmp_path).items() if name != "log.jsonl"} == {
        name: value for name, value in before.items() if name != "log.jsonl"
    }
    distill_tiny(tmp_path)
    distill_tiny(tmp_path.with_name("whole"))
    assert contents(tmp_path)["adapter.safetensors"] == contents(tmp_path.with_name("whole"))["adapter.safetensors"]


def before_size(directory):
    """One byte less than a checkpoint needs."""
    return (directory / "checkpoint.safetensors").stat().st_size - 1


class Exploding(Trajectories):
    """The states of a tiny run in `directory`, with NaN in the seventh batch."""

    def __init__(self, directory):
        collect_tiny(directory / "trajectories", trajectories=6, steps=(3, 4))
        super().__init__(directory / "trajectories")
        self.left = 7

    def batches(self, rows):
        batches = super().batches(rows)
        self.left -= 1
        if self.left == 0:
            batches[0].target.fill_(float("nan"))
        return batches


def test_append_text_on_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=f"could not write {tmp_path}/log"):
        in_child(append_until_full, tmp_path / "log")


@pytest.fixture
def read_only():
    """A folder that anybody may read and nobody but root may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)


def as_nobody(function, *arguments):
    """Run as a user whom file permissions bind."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    function(*arguments)


def distill_on(states, directory):
    distill_tiny(directory, trajectories=Trajectories(states))


@pytest.mark.parametrize(
    ("function", "file"),
    [
        (collect_tiny, "manifest.json"),
        (save_random, "adapter.safetensors"),
        (distill_tiny, "trajectories/manifest.json"),
    ],
)
@pytest.mark.parametrize("folder", ["", "new"])
def test_a_read_only_folder_is_named(read_only, function, file, folder):
    with pytest.raises(OSError, match=f"could not write {read_only / folder / file}.*Permission denied"):
        in_child(as_nobody, function, read_only / folder)
    assert contents(read_only) == {}


def test_distill_into_a_read_only_folder_on_trajectories_collected_before(read_only):
    with tempfile.TemporaryDirectory() as states:
        os.chmod(states, 0o755)
        collect_tiny(Path(states))
        with pytest.raises(OSError, match=f"could not write {read_only}/log.jsonl.*Permission denied"):
            in_child(as_nobody, distill_on, states, read_only)
    assert contents(read_only) == {}


def test_load_from_a_folder_that_may_not_be_read(read_only):
    os.chmod(read_only, 0o755)
    save_random(read_only)
    os.chmod(read_only / "adapter.safetensors", 0o600)
    if os.getuid():
        os.chmod(read_only / "adapter.safetensors", 0)
    with pytest.raises(OSError, match="adapter.safetensors may not be read"):
        in_child(as_nobody, load_tiny, read_only)


def load_tiny(directory):
    agd.load(tiny_teacher(), directory)
