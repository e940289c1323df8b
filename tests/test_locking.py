"""One process at a time writes to a folder."""

import errno
from contextlib import contextmanager, nullcontext
from importlib import import_module
from types import SimpleNamespace

import pytest

import agd_fast.locking
from agd_fast.locking import LOCK_NAME, only_writer
from helpers_distillation import collect_tiny, contents, distill_tiny, in_child, kill_in_child, kill_self
from helpers_evaluation import evaluate, with_adapter

collecting = import_module("agd_fast.trajectories.collect")  # the package has the function of that name


def killed_inside(folder):
    with only_writer(folder):
        kill_self()


def test_a_folder_is_free_again_when_its_writer_is_done_fails_or_is_killed(tmp_path):
    with only_writer(tmp_path):
        pass
    with pytest.raises(KeyError), only_writer(tmp_path):
        raise KeyError
    kill_in_child(killed_inside, tmp_path)
    with only_writer(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_NAME]
    assert contents(tmp_path) == {}
    with only_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("write", [collect_tiny, distill_tiny, lambda folder: evaluate(with_adapter(), folder)])
def test_a_second_writer_fails_at_once_and_names_the_folder(tmp_path, write):
    with only_writer(tmp_path):
        with pytest.raises(OSError, match=f"another process is writing to {tmp_path}; expected another folder"):
            write(tmp_path)
        assert list(contents(tmp_path)) == [LOCK_NAME]


def test_another_process_is_kept_out(tmp_path):
    with only_writer(tmp_path), pytest.raises(BlockingIOError, match="another process is writing"):
        in_child(collect_tiny, tmp_path)


def test_what_is_collected_whole_is_read_beside_a_writer(tmp_path):
    collect_tiny(tmp_path)
    with only_writer(tmp_path):
        assert len(collect_tiny(tmp_path)) == 5 * 4


def test_an_evaluation_holds_its_folder_to_the_end(tmp_path, monkeypatch):
    def twice(*_):
        with only_writer(tmp_path):
            pytest.fail("another one was let in")

    monkeypatch.setattr("agd_fast.pipeline_evaluation.write_pipeline_report", twice)
    with pytest.raises(BlockingIOError, match="another process is writing"):
        evaluate(with_adapter(), tmp_path)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_another_process_collected_while_this_one_looked_is_kept(tmp_path, monkeypatch, seed):
    @contextmanager
    def late(folder):
        monkeypatch.setattr(collecting, "only_writer", only_writer)
        collect_tiny(folder)
        monkeypatch.setattr(collecting, "_run_shard", lambda *_: pytest.fail("collected again"))
        before.update(contents(folder))
        with only_writer(folder):
            yield

    before = {}
    monkeypatch.setattr(collecting, "only_writer", late)
    with pytest.raises(ValueError, match="holds other trajectories") if seed else nullcontext():
        collect_tiny(tmp_path, seed=seed)
    assert contents(tmp_path) == before


def test_where_nothing_can_be_locked_folders_are_written_without(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with only_writer(tmp_path), only_writer(tmp_path):
        pass
    assert contents(tmp_path) == {}


def test_of_several_processes_the_main_one_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(agd_fast.locking, "is_initialized", lambda: True)
    monkeypatch.setattr(agd_fast.locking, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    with only_writer(tmp_path), only_writer(tmp_path):
        assert contents(tmp_path) == {}
