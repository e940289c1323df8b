"""The packing kernels where there is no GPU: their own sources, thread by thread, under sanitizers; see `cuda_on_host`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_on_host.build import build, with_calls

CHECK = Path(__file__).parent / "cuda_on_host" / "check.py"


def library(name):
    """As the compiler finds it."""
    return subprocess.run(["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++") or not Path(library("libasan.so")).is_file(),
    reason="expected g++ with AddressSanitizer, which is there on Linux",
)


def test_kernels_are_right_and_touch_no_memory_but_their_own(tmp_path):
    build(tmp_path)
    sanitized = {"LD_PRELOAD": f"{library('libasan.so')} {library('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [sys.executable, str(CHECK), str(tmp_path)], env={**os.environ, **sanitized}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert " checks of 12 ops, 0 red" in done.stdout


def test_launches_become_calls():
    source = "void f() {\n  kernel<T, bits()>\n      <<<blocks(a, b), 128, 0, stream>>>(rows, Halves(D));\n}"
    assert with_calls(source) == (
        "void f() { on_host::launch(blocks(a, b), 128, [&] { kernel<T, bits()>(rows, Halves(D)); });\n}"
    )
