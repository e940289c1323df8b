"""bench/gpu_session.sh: a machine prepared, what is missing said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHELL = Path(__file__).parents[1] / "bench/gpu_session.sh"

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
    assert build.startswith("setup.py -q build_ext --inplace") and f"{tmp_path}/scratch/site:{SHELL.parents[1]}" in runs
    options = runs.split()
    assert options[:5] == ["bench/on_gpu.py", "--output", f"{tmp_path}/scratch/results", "--tar", f"{tmp_path}/out/gpu.tar.gz"]
    assert options[5] == "--minutes" and 8.5 < float(options[6]) <= 9 and options[7:9] == ["--names", "checks/*"]
    assert len(machine("out", "9")[2]) == 5  # what is installed is not installed again


def test_the_script_says_what_is_missing(machine):
    assert machine()[:2] == ("gpu_session: expected the folder to write to, found no argument\n", 2)
    assert "expected minutes as the second argument, found '--list'" in machine("out", "--list")[0]
    said, code, called = machine("out", lacking="diffusers")
    assert code == 2 and "found none; there is no diffusers here" in said and not called
