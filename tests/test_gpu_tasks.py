"""bench/session/: which commands a session on a GPU runs, in which order, and the parts that are made for it."""

import argparse
import importlib
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import distill_memory
import nfe_speed
from agd_fast.files import read_json
from agd_fast.ops import OPS
from memory import training
from session import alone, judged
from session.tasks import all_stages, photographs
from speed import models
from speed.arms import ARMS, engine_config
from speed.kept import Kept
from speed.measure import Kernels, Measured

BENCH = Path(__file__).parents[1] / "bench"


ORDER = [
    ["checks/engine_sdxl", "checks/engine_dit", "nfe_speed/sdxl-1024_1", "nfe_speed/sdxl-1024_16", "nfe_speed/dit-xl2-256_1"],
    ["checks/graphed_passes"],
    ["distill_memory/graphed_packed_cap8", "nfe_speed/sdxl-1024_4", "nfe_speed/dit-xl2-256_16", "nfe_speed/dit-xl2-256_4"],
    ["distill_memory/images_at_24_graphed"],
    ["packing_kernels"],
    ["checks/kernel_activated_linear_*", "checks/kernel_gated_lora_float32"],
    ["nfe_speed_kernels/dit-xl2-256_1"],
    ["distill_memory/images_at_24"],
    ["distill_memory/cap8"],
    ["distill_memory/int8_cap6"],
    ["kernels/activated_linear"],
    ["nfe_speed_kernels/sdxl-1024_1"],
    ["checks/engine_sd15", "checks/sanitizer_*"],
    ["nfe_speed/sd21-768_1", "nfe_speed/qwen-image_1"],
]


def test_what_is_worth_most_comes_first():
    names = [task.name for stage in all_stages() for task in stage]
    last = -1
    for globs in ORDER:
        found = [index for index, name in enumerate(names) for glob in globs if fnmatch(name, glob)]
        assert len(found) >= len(set(globs)) and min(found) > last, globs
        last = max(found)


def test_tasks_are_of_every_op_and_model():
    tasks = [task for stage in all_stages() for task in stage]
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names) and {f"kernels/{op}" for op in OPS} < set(names)
    kernels = {f"checks/kernel_{op}_{dtype}" for op in OPS for dtype in ("bfloat16", "float16", "float32")}
    assert kernels | {"checks/engine_sdxl", "nfe_speed/sdxl-1024_16"} < set(names)
    needs = {need for task in tasks for need in task.needs}
    assert kernels < needs < set(names) and all(name.startswith("checks/") for name in needs)
    of = {task.name: task.needs for task in tasks}
    assert of["nfe_speed/dit-xl2-256_4"] == ["checks/engine_dit"] and of["distill_memory/cap8"] == ["checks/packing"]
    graphed = [name for name in names if name.startswith("distill_memory/") and "graphed" in name]
    assert len(graphed) == 4 and all(of[name] == ["checks/packing", "checks/graphed_passes"] for name in graphed)
    processes = {task.name: task.processes for task in tasks}
    assert processes["nfe_speed/sdxl-1024_1"] == 5 and processes["nfe_speed/sdxl-1024_16"] == 4  # CFG in the engine is at 1 alone
    for task in tasks:
        assert task.times == ("{lock}" in task.command) == (not task.is_check and "--whole" not in task.command), task.name


class ParsedError(Exception):
    pass


@pytest.mark.parametrize("stage", [*all_stages(), *photographs(Path("train.npz"))], ids=lambda stage: stage[0].name)
def test_commands_are_what_their_scripts_take(stage, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser):
        parse(parser)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    for task in stage:
        own = {"json": "found.json", "lock": "lock", "output": "output", "minutes": "1", "patience": "1"}
        parts = [part.format(**own) for part in task.command]
        if "session.alone" in parts:
            parts = parts[4:]
        if "session.judged" in parts:
            assert parts[:4] == ["-m", "session.judged", "--json", "found.json"]
            parts = parts[parts.index("--") + 1 :]
        name, options = (parts[1], parts[2:]) if parts[0] == "-m" else (parts[0].removesuffix(".py"), parts[1:])
        monkeypatch.setattr(sys, "argv", [name, *options])
        with pytest.raises(ParsedError):
            importlib.import_module(name).main()


LOCKS = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"


def test_a_command_alone_holds_the_lock(tmp_path, monkeypatch):
    lock = str(tmp_path / "lock")
    monkeypatch.setattr(sys, "argv", ["alone", lock, sys.executable, "-c", LOCKS, lock])
    with pytest.raises(SystemExit, match="1"):
        alone.main()
    assert subprocess.run([sys.executable, "-c", LOCKS, lock]).returncode == 0


class Steps:
    """In place of a training: whether the lock is held at each of its steps."""

    device = torch.device("cpu")

    def __init__(self, lock):
        self.lock, self.locked, self.passes_run = lock, [], 0

    def passes(self, batch):
        def run():
            self.passes_run += 1
            return torch.zeros(())

        return run

    def step(self):
        self.locked.append(subprocess.run([sys.executable, "-c", LOCKS, self.lock], capture_output=True).returncode == 1)


def test_a_row_of_memory_holds_the_lock_while_it_takes_times(tmp_path):
    steps = Steps(tmp_path / "lock")
    steps.lock.touch()
    training._measure(steps, 2, 0.0, 8, steps.lock)
    assert steps.locked == [False, False, True] and steps.passes_run == 2 + 8 // 2


def test_a_worker_of_memory_is_given_all_that_counts(tmp_path, monkeypatch):
    path = tmp_path / "row.json"

    def train_row(row, seconds, images, lock):
        return {**row, "seconds": seconds, "images": images, "lock": str(lock)}

    monkeypatch.setattr(distill_memory, "train_row", train_row)
    options = ["--worker", '{"mode": "8bit", "whole": false}', "--json", path, "--images", 8, "--seconds", 2, "--lock", "l"]
    monkeypatch.setattr(sys, "argv", ["distill_memory.py", *map(str, options)])
    distill_memory.main()
    assert read_json(path) == {"mode": "8bit", "whole": False, "seconds": 2.0, "images": 8, "lock": "l"}


class Late:
    """In place of a worker: one of its arms is never made."""

    def __init__(self, arms):
        self.arms = arms

    def made(self, seconds):
        assert 0 <= seconds <= 5
        if "agd_engine" in self.arms:
            raise TimeoutError
        return {arm: Measured(nfe=2.0) for arm in self.arms}

    def output(self, arm):
        return torch.ones(2)

    def run(self, arm):
        pass


def settings_of(arms, **changed):
    counted = {"adapter": None, "arm": "none", "model": "none", "batch": 1, "steps": 1, "dtype": "none"}
    made = models.Settings(arms, 2, 2, torch.float32, torch.device("cpu"), 4.0, counts=[counted], processes=True, patience=5.0)
    return replace(made, **changed)


def with_workers(monkeypatch, kind):
    monkeypatch.setattr(models, "workers", lambda make: nullcontext({group: kind(one.args[0]) for group, one in make.items()}))


def test_what_is_late_leaves_the_others_their_times(monkeypatch, tmp_path):
    with_workers(monkeypatch, Late)
    rows = models.measure_model("dit-xl2-256", [1], settings_of(["unguided", "agd", "agd_engine"]))
    assert [(row["arm"], row["ms_per_step"] is None, row["note"]) for row in rows] == [
        ("unguided", False, None),
        ("agd", False, None),
        ("agd_engine", True, models.LATE),
    ]
    for some, complete in ((rows, False), (rows[:2], True)):
        monkeypatch.setattr(nfe_speed, "measure_model", lambda *_, some=some, **__: some)
        monkeypatch.setattr(sys, "argv", ["nfe_speed.py", "--model", "dit-xl2-256", "--json", str(tmp_path / "a.json")])
        nfe_speed.main()
        found = read_json(tmp_path / "a.json")
        assert found["complete"] is complete and found["rounds"] == 10 and found["commit"]


class Ended(Late):
    """The second of its arms' rounds that are timed ends all."""

    def run(self, arm):
        runs.append(arm)
        if runs.count(arm) == 3:
            raise SystemExit

    def output(self, arm):
        assert not runs
        return torch.ones(2)


runs = []


def test_who_is_ended_leaves_the_rounds_that_there_were(monkeypatch, tmp_path):
    runs.clear()
    with_workers(monkeypatch, Ended)
    seen, kept = [], Kept(tmp_path / "a.json", lambda: {"commit": "0"})

    def keep(rows):
        kept(rows)
        seen.append([row["seconds"] and row["seconds"]["rounds"] for row in read_json(tmp_path / "a.json")["rows"]])

    with pytest.raises(SystemExit):
        models.measure_model("dit-xl2-256", [1], settings_of(["unguided", "cfg_compiled"]), keep=keep)
    assert seen == [[None, None], [None, None], [1, 1]]  # two workers that have made their arms, and a round
    found = read_json(tmp_path / "a.json")
    assert found["complete"] is False and found["commit"] == "0" and all(row["ms_per_step"] is not None for row in found["rows"])


def test_less_than_was_kept_takes_no_place(tmp_path):
    def rows(*rounds):
        return [{"seconds": count and {"rounds": count}} for count in rounds]

    def kept_after(own, complete=False):
        Kept(tmp_path / "a.json", dict)(own, complete)
        found = read_json(tmp_path / "a.json")
        return found["rows"], found["complete"]

    assert kept_after(rows(None, None)) == (rows(None, None), False)
    assert kept_after(rows(3, 3)) == (rows(3, 3), False)
    assert kept_after(rows(3, 2)) == (rows(3, 3), False)
    assert kept_after(rows(4, 3)) == (rows(4, 3), False)
    assert kept_after(rows(1, None), True) == (rows(1, None), True)


class OnCard(Late):
    """Whether the lock is held where kernels are looked at."""

    lock = None

    def kernels(self, arm):
        locked.append(subprocess.run([sys.executable, "-c", LOCKS, self.lock], capture_output=True).returncode == 1)
        return Kernels(6, 0.25, [("gemm", 6, 0.25)])


locked = []


def test_kernels_are_profiled_under_the_lock(monkeypatch, tmp_path, capsys):
    locked.clear()
    with_workers(monkeypatch, OnCard)
    monkeypatch.setattr(OnCard, "lock", tmp_path / "lock")
    OnCard.lock.touch()
    measured = {"unguided": Measured(), "cfg": Measured(timed_steps=1)}
    made = settings_of([*measured], device=torch.device("cuda"), lock=tmp_path / "lock", profile=True)
    models._time_processes("dit-xl2-256", 1, measured, made, lambda: None)
    assert locked == [True, True] and [one.device_seconds for one in measured.values()] == [0.25, 0.5]
    assert "cfg: 6 kernels, 250.00 ms" in capsys.readouterr().out


def test_arms_are_what_their_table_says():
    compiled = {"cfg_compiled", "unguided_engine", "cfg_engine", "agd_engine", "agd_engine_whole", "agd_kernels"}
    assert {name for name, kind in ARMS.items() if kind.compiled} == compiled
    assert {kind.plain for kind in ARMS.values()} == {None, "unguided", "cfg", "agd"}
    assert all(ARMS[kind.plain].method == kind.method and ARMS[kind.plain].engine is None for kind in ARMS.values() if kind.plain)
    for kind in ARMS.values():
        if kind.engine is not None:
            counted = engine_config(kind.engine, counted=True)
            assert counted.graph is counted.compile is engine_config(kind.engine, compiled=False).compile is False
            assert counted.kernels == (kind.engine.kernels or "never") and engine_config(kind.engine) == kind.engine


@pytest.mark.parametrize(("errors", "code", "ok"), [(0, 0, True), (3, 1, False), (None, 0, False)])
def test_sanitizer(tmp_path, errors, code, ok):
    said = "nothing" if errors is None else f"========= ERROR SUMMARY: {errors} errors"
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@ $PYTORCH_NO_CUDA_MEMORY_CACHING"\necho "{said}"\nexit {code}\n')
    tool.chmod(0o755)
    row = judged.sanitize(["-m", "speed.kernel_checks", "--odd"], str(tool))
    assert row["ok"] == ok and row["summary"] == ([] if errors is None else [f"ERROR SUMMARY: {errors} errors"])
    assert "--tool memcheck" in row["end"] and "kernel_checks --odd 1\n" in row["end"]


@pytest.mark.parametrize(("options", "code", "rows"), [([], 0, 1), ([], 3, 1), (["--sanitizer"], 3, 0)])
def test_judged_by_the_exit_code(tmp_path, monkeypatch, options, code, rows):
    monkeypatch.setattr(judged.shutil, "which", lambda name, path: None)
    command = ["-c", f"print('said'); raise SystemExit({code})"]
    monkeypatch.setattr(sys, "argv", ["judged", "--json", str(tmp_path / "out.json"), *options, "--", *command])
    with pytest.raises(SystemExit) as ended:
        judged.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert bool(ended.value.code) == bool(code and rows) and len(found["rows"]) == rows
    assert found["complete"] == bool(rows)  # what nothing was checked for is to be checked again
    assert all(row["ok"] == (not code) and row["end"] == "said\n" and row["checked"] == command for row in found["rows"])
