"""Every kernel compiles for every architecture without a GPU, spills no register and fits in shared memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from agd_fast.ops import OPS


@pytest.mark.parametrize("op_name", [*OPS, "write_merged"])
def test_compiles_ahead_of_time(op_name):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), op_name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
