"""bench/on_gpu.py and bench/session/: order, going on, the end in time, checks and what needs them."""

import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import on_gpu
from agd_fast.files import PARTIAL
from session.results import Results
from session.running import Session
from session.tasks import Task
from speed.hardware import quiet

BENCH = Path(__file__).parents[1] / "bench"
LONG = "import time; time.sleep(600)"


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


def test_what_is_published_has_its_folder_and_no_file_is_taken_from_its_writer(tmp_path):
    results = Results(tmp_path / "output", tmp_path / "earlier")
    place = results.place("memory/cap8", ["checks/a"])
    place.write_text("{}")
    partial = place.with_name(f".{place.name}{PARTIAL}")
    other = place.with_name(f"{place.name}{PARTIAL}")
    partial.write_text("")
    other.write_text("")
    (tmp_path / "output/checks").mkdir()
    (tmp_path / "output/checks/a.json").write_text('{"complete": true, "rows": []}')
    results.publish("memory/cap8", ["checks/a"])
    assert read(tmp_path, "memory/cap8") == {} and not place.exists()
    assert partial.exists() and other.exists()


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
