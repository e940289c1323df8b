"""bench/speed/workers.py: arms that are kept in processes of their own."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from speed.workers import workers


def make_in_a_worker(value):
    return {"told": value}, {"arm": partial(torch.full, (2,), value, dtype=torch.bfloat16)}


def test_workers_keep_arms_and_may_end():
    with workers({"a": partial(make_in_a_worker, 3.0), "b": partial(make_in_a_worker, 4.0), "c": partial(os._exit, 3)}) as found:
        assert (found["a"].made(), found["b"].made()) == ({"told": 3.0}, {"told": 4.0})
        assert found["b"].run("arm") is None and torch.equal(found["b"].output("arm"), torch.full((2,), 4.0))
        with pytest.raises(EOFError):
            found["c"].made()
    assert [worker.process.exitcode for worker in found.values()] == [0, 0, 3]


def test_who_is_late_is_ended():
    with workers({"a": partial(time.sleep, 60)}) as found, pytest.raises(TimeoutError):
        found["a"].made(0.1)
    assert found["a"].process.exitcode == -signal.SIGKILL
