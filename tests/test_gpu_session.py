"""bench/on_gpu.py, bench/session/ and bench/gpu_session.sh: order, going on, the end in time, checks and what needs them."""

import argparse
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import distill_memory
import nfe_speed
import on_gpu
from agd_fast.files import read_json
from agd_fast.ops import OPS
from memory import training
from session import alone, judged
from session.results import Results
from session.running import Session
from session.tasks import Task, all_stages, photographs
from speed import models
from speed.hardware import quiet
from speed.measure import Measured

BENCH = Path(__file__).parents[1] / "bench"
LONG = "import time; time.sleep(600)"
SHELL = BENCH / "gpu_session.sh"


def writing(content, then="print('said')"):
    return ["-c", f"import sys; open(sys.argv[1], 'w').write({json.dumps(content)!r}); {then}", "{json}"]


def session(folder, *stages, seconds=90, jobs=8, tar=None, earlier=None):
    """After its run."""
    results = Results(folder / "output", earlier or folder / "earlier")
    found = Session(stages, results, time.monotonic() + seconds, jobs, tar)
    found.run()
    return found


def read(folder, name):
    return json.loads((folder / f"output/{name}.json").read_text())


def held(tar):
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file if member.name.endswith(".json")}


def until(happened, seconds=60):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end


def state(pid):
    """Of a process: R, S, T (stopped) and so on; Z where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


ORDER = [
    [
        "checks/engine_sdxl",
        "checks/engine_dit",
        *(f"nfe_speed/{one}" for one in ("sdxl-1024_1", "dit-xl2-256_*", "dit-xl2-256_*")),
    ],
    ["distill_memory/cap8"],
    ["distill_memory/int8_cap6"],
    ["distill_memory/uncapped"],
    ["distill_memory/images_at_24"],
    ["packing_kernels"],
    ["checks/kernel_activated_linear_*", "checks/kernel_gated_lora_float32", "kernels/activated_linear"],
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
    assert all(task.times != task.is_check and ("{lock}" in task.command) == task.times for task in tasks)


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


def test_a_task_writes_its_json_once(tmp_path, capsys):
    task = Task("checks/a", writing({"rows": [{"ok": True}]}))
    session(tmp_path, [task])
    written = (tmp_path / "output/checks/a.json").stat().st_mtime_ns
    session(tmp_path, [task])
    assert (tmp_path / "output/checks/a.json").stat().st_mtime_ns == written
    assert (tmp_path / "output/logs/checks/a.log").read_text() == "said\n"
    assert capsys.readouterr().out.count("checks/a: done after") == 1


def test_what_was_measured_earlier_is_left_alone_and_what_was_begun_goes_on(tmp_path):
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    for name, content in {"whole": {}, "begun": {"complete": False, "rows": [1]}, "wrong": {"red": [{"op": "pack"}]}}.items():
        (earlier / f"{name}.json").write_text(json.dumps(content))
    (earlier / "checks").mkdir()
    (earlier / "checks/kernel_pack.json").write_text(json.dumps({"rows": []}))  # all dtypes at once
    more = "import json, sys; found = json.load(open(sys.argv[1])); found['rows'] = found.get('rows', []) + [2]\n"
    more += "json.dump({**found, 'complete': True, 'red': []}, open(sys.argv[1], 'w'))"
    names = ("whole", "begun", "wrong", "checks/kernel_pack_float16")
    found = session(tmp_path, [Task(name, ["-c", more, "{json}"]) for name in names], earlier=earlier)
    assert not found.failed and {path.stem for path in (tmp_path / "output").rglob("*.json")} == {"begun", "wrong"}
    assert read(tmp_path, "begun")["rows"] == [1, 2] and json.loads((earlier / "begun.json").read_text())["rows"] == [1]


def test_the_end_is_in_time_and_what_is_there_is_whole(tmp_path, capsys):
    tar, child = tmp_path / "all.tar.gz", tmp_path / "child"
    begins = "import subprocess, sys; subprocess.Popen(['sh', '-c', 'echo $$ > {child}; exec sleep 600']).wait()"
    stage = [
        Task("quick", writing({"rows": [1]}), least=0),
        Task("some_rows", writing({"complete": False, "rows": [1]}, LONG), least=0),
        Task("long", ["-c", begins.replace("{child}", str(child))], least=0),
        Task("late", writing({}), least=600),
        Task("red", ["-c", "import sys; sys.exit(3)"], least=0),
    ]
    began = time.monotonic()
    found = session(tmp_path, stage, seconds=4, tar=tar)
    assert time.monotonic() - began < 8 and found.failed == ["red"] and set(found.left) == {"some_rows", "long", "late"}
    until(lambda: state(int(child.read_text())) == "Z")
    said = capsys.readouterr().out
    assert "long: no time left after" in said and "some_rows: no time left" in said and "red: failed (3) after" in said
    assert {name: json.loads(content)["rows"] for name, content in held(tar).items()} == {
        "quick.json": [1],
        "some_rows.json": [1],
    }


KILLED = """
import math, sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.path.append(sys.argv[2])
from session.results import Results
from session.running import Session
from session.tasks import Task
long = f"import os, time; open({str(folder / 'group')!r}, 'w').write(str(os.getpgrp())); time.sleep(600)"
quick = "import sys; open(sys.argv[1], 'w').write('{}')"
stage = [Task("quick", ["-c", quick, "{json}"]), Task("long", ["-c", long])]
Session([stage], Results(folder / "output", folder / "earlier"), math.inf, 2, folder / "all.tar.gz").run()
"""


def test_the_tar_is_there_when_it_is_killed(tmp_path):
    tar, group = tmp_path / "all.tar.gz", tmp_path / "group"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path), str(BENCH)])
    until(lambda: tar.exists() and held(tar) and group.exists() and group.read_text())
    process.kill()
    process.wait()
    os.killpg(int(group.read_text()), signal.SIGKILL)
    assert list(held(tar)) == ["quick.json"]


def test_results_count_once_their_checks_are_green(tmp_path):
    waits = f"import os, time\nwhile not os.path.exists({str(tmp_path / 'output/unchecked/speed.json')!r}): time.sleep(0.01)"
    check = ["-c", f"{waits}\nimport sys; open(sys.argv[1], 'w').write('{{\"rows\": [{{\"ok\": true}}]}}')", "{json}"]
    found = session(tmp_path, [Task("checks/a", check), Task("speed", writing({"rows": [1]}), ["checks/a"], times=True)])
    assert read(tmp_path, "speed")["rows"] == [1] and not (tmp_path / "output/unchecked/speed.json").exists()
    assert on_gpu.report(found) == 0


@pytest.mark.parametrize("complete", [True, False])
def test_red_checks_hold_up_what_needs_them_and_nothing_else(tmp_path, capsys, complete):
    red = {"complete": complete, "rows": [{"ok": True}, {"ok": False, "op": "x"}]}
    stage = [
        Task("checks/a", writing(red, "sys.exit(1)")),
        Task("checks/b", writing({"rows": []})),
        Task("of_a", writing({}), ["checks/a", "checks/b"], times=True),
        Task("of_b", writing({}), ["checks/b"], times=True),
    ]
    found = session(tmp_path, stage)
    assert read(tmp_path, "of_b") == {} and not (tmp_path / "output/of_a.json").exists()
    assert read(tmp_path, "unchecked/of_a") == {} and on_gpu.report(found) == 1
    said = capsys.readouterr().out
    assert "red: checks/a, first {'ok': False, 'op': 'x'}; delete its JSON to check again" in said
    assert (
        "unchecked: of_a counts for nothing until all of it is green: checks/a, checks/b" in said
        and "unchecked: of_b" not in said
    )
    (tmp_path / "output/checks/a.json").write_text('{"rows": [{"ok": true}]}')
    found = session(tmp_path, stage)
    assert read(tmp_path, "of_a") == {} and on_gpu.report(found) == 0


def test_times_of_a_stage_wait_for_those_before_and_neither_for_checks_nor_checks_for_them(tmp_path):
    told = tmp_path / "told"
    says = f"import os\nopen({str(told)!r}, 'a').write(sys.argv[2] + ' ')"

    def task(name, after="", **how):
        waits = f"\nwhile {after!r} not in open({str(told)!r}).read(): pass"
        return Task(name, [*writing({}, says + waits), name], least=0, **how)

    stages = [task("first", "checks/c", times=True), task("checks/d", "second")], [task("second", times=True)], [task("checks/c")]
    assert not session(tmp_path, *stages, seconds=30).left
    assert told.read_text().split()[-2:] == ["checks/c", "second"]


@pytest.mark.parametrize(("processes", "begun"), [((9, 1, 1), ["0"]), ((1, 1, 1), ["0", "1"]), ((1, 2, 1), ["0"])])
def test_no_more_run_than_there_are_jobs_and_in_order(tmp_path, processes, begun):
    stage = [Task(str(index), ["-c", LONG], processes=many) for index, many in enumerate(processes)]
    found = Session([stage], Results(tmp_path, tmp_path), math.inf, 2)
    found._begin()
    names = [one.task.name for one in found.running]
    found.deadline = 0
    found.run()
    assert names == begun


def test_others_stand_still_while_times_are_taken(tmp_path):
    lock = tmp_path / "lock"
    others = [subprocess.Popen([sys.executable, "-c", LONG], preexec_fn=os.setpgrp) for _ in range(2)]
    try:
        lock.write_text(f"{others[0].pid}\n{os.getpgrp()}\n")
        with quiet(lock):
            until(lambda: state(others[0].pid) == "T")
            assert state(others[1].pid) in "RS" and state(os.getpid()) in "RS"
        until(lambda: state(others[0].pid) in "RS")
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_a_session_names_its_processes_and_lets_go_who_was_stopped_for_nobody(tmp_path):
    seen = tmp_path / "seen"
    stops = f"import os, signal, sys, time; lock, out = {str(tmp_path / 'output/lock')!r}, sys.argv[1]\n"
    stops += "groups = []\nwhile len(groups) < 2: groups = open(lock).read().split()\n"
    stops += "other = next(int(one) for one in groups if int(one) != os.getpgrp()); os.killpg(other, signal.SIGSTOP)\n"
    stops += f"open({str(seen)!r}, 'w').write('stopped'); os.killpg(os.getpgrp(), signal.SIGKILL)"
    waits = f"import os\nwhile not os.path.exists({str(seen)!r}): pass"
    found = session(tmp_path, [Task("stops", ["-c", stops, "{json}"]), Task("goes_on", ["-c", waits])])
    assert found.failed == ["stops"] and not found.left


def test_nothing_is_begun_while_times_are_taken(tmp_path):
    results = Results(tmp_path, tmp_path)
    found = Session([[Task("a", writing({}))]], results, math.inf, 1)
    with quiet(tmp_path / "lock"):
        found._begin()
        assert not found.running and found.waiting
    found.run()
    assert results.whole("a") == {}


def test_one_command(tmp_path, monkeypatch, capsys):
    earlier, tar = tmp_path / "earlier", tmp_path / "all.tar.gz"
    (earlier / "photographs").mkdir(parents=True)
    (earlier / "photographs/teacher.json").write_text("{}")
    sees = Task(
        "photographs", ["-c", "import os, sys; sys.exit(not os.path.exists(sys.argv[1]))", "{output}/photographs/teacher.json"]
    )
    stages = [[Task("a", writing({"rows": [1]})), Task("b", ["-c", "import sys; sys.exit(3)"])]]
    for name, fake in {"RESULTS": earlier, "all_stages": lambda: stages, "photographs": lambda data: [[sees]]}.items():
        monkeypatch.setattr(on_gpu, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*options):
        own = ["--output", tmp_path / "output", "--tar", tar, "--minutes", 2, *options]
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", *map(str, own)])
        with pytest.raises(SystemExit) as ended:
            on_gpu.main()
        return ended.value.code

    assert run("--names", "a") == 0 and list(held(tar)) == ["a.json"]
    assert run() == 1 and "failed: b, see logs/b.log" in capsys.readouterr().out
    assert run("--photographs", "train.npz") == 0 and set(held(tar)) == {"a.json", "photographs/teacher.json"}


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
    options = ["--worker", '{"mode": "8bit"}', "--json", path, "--images", 8, "--seconds", 2, "--lock", "l"]
    monkeypatch.setattr(sys, "argv", ["distill_memory.py", *map(str, options)])
    distill_memory.main()
    assert read_json(path) == {"mode": "8bit", "seconds": 2.0, "images": 8, "lock": "l"}


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


def test_what_is_late_leaves_the_others_their_times(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "workers", lambda make: nullcontext({group: Late(one.args[0]) for group, one in make.items()}))
    counted = {"adapter": None, "arm": "none", "model": "none", "batch": 1, "steps": 1, "dtype": "none"}
    arms, cpu = ["unguided", "agd", "agd_engine"], torch.device("cpu")
    made = models.Settings(arms, 2, 2, torch.float32, cpu, 4.0, counts=[counted], processes=True, patience=5.0)
    rows = models.measure_model("dit-xl2-256", [1], made)
    assert [(row["arm"], row["ms_per_step"] is None, row["note"]) for row in rows] == [
        ("unguided", False, None),
        ("agd", False, None),
        ("agd_engine", True, models.LATE),
    ]
    for some, complete in ((rows, False), (rows[:2], True)):
        nfe_speed._report(some, made, argparse.Namespace(json=tmp_path / "a.json", plot=None))
        assert read_json(tmp_path / "a.json")["complete"] is complete


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


PYTHON = """#!/bin/sh
case "$1" in
-) sed -n 's/^names = "\\(.*\\)"/\\1/p' > /dev/null; test -e "$SCRATCH/site/diffusers" || echo "$LACKING" ;;
-m) shift; echo "$@" >> "$SAID"; mkdir -p "$SCRATCH/site/diffusers" ;;
-c) exec "$REAL" "$@" ;;
*) echo "$@ $PYTHONPATH" >> "$SAID"; test "$1" != bench/on_gpu.py || exit "$CODE" ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """→ what the script says there, its exit code, what it called; commands are stubs."""
    for name, text in {"python3": PYTHON, "nvidia-smi": "#!/bin/sh\necho card\n"}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)

    def call(*args, lacking="", code=0):
        own = {"SCRATCH": tmp_path / "scratch", "SAID": tmp_path / "said", "WHEELS": tmp_path / "wheels", "LACKING": lacking}
        own |= {"REAL": sys.executable, "CODE": code, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        own = {**os.environ, **{name: str(value) for name, value in own.items()}}
        done = subprocess.run(["bash", SHELL, *map(str, args)], env=own, capture_output=True, text=True, cwd=tmp_path)
        said = tmp_path / "said"
        return done.stdout + done.stderr, done.returncode, said.read_text().splitlines() if said.exists() else []

    return call


def test_the_script_prepares_a_machine(machine, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/diffusers.whl").touch()
    said, code, (install, build, runs) = machine("out", "9", "--names", "checks/*", lacking="diffusers", code=5)
    assert code == 5 and "card" in said and (tmp_path / "out/session.log").is_file()
    assert (
        install.startswith("pip install") and install.endswith(str(tmp_path / "wheels/diffusers.whl")) and "--no-index" in install
    )
    assert build.startswith("setup.py -q build_ext --inplace") and f"{tmp_path}/scratch/site:{BENCH.parent}" in runs
    options = runs.split()
    assert options[:5] == ["bench/on_gpu.py", "--output", f"{tmp_path}/scratch/results", "--tar", f"{tmp_path}/out/gpu.tar.gz"]
    assert options[5] == "--minutes" and 8.5 < float(options[6]) <= 9 and options[7:9] == ["--names", "checks/*"]
    assert len(machine("out", "9")[2]) == 5  # what is installed is not installed again


def test_the_script_says_what_is_missing(machine):
    assert machine()[:2] == ("gpu_session: expected the folder to write to, found no argument\n", 2)
    assert "expected minutes as the second argument, found '--list'" in machine("out", "--list")[0]
    said, code, called = machine("out", lacking="diffusers")
    assert code == 2 and "found none; there is no diffusers here" in said and not called
