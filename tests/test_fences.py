"""Kernels that read or write beside their tensors, which a GPU may not tell: in Triton's interpreter, on fenced memory."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fences import fenced

HERE = Path(__file__).parent
BESIDE = """
import sys, torch, triton, triton.language as tl
sys.path.append({here!r})
from fences import Fences

@triton.jit
def copy(x, y, n, off, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + off, mask=i < n), mask=i < n)

with Fences({side!r}):
    x = torch.randn(5)
    y = torch.empty_like(x)
copy[(1,)](x, y, 5, {off}, 8)
assert torch.equal(x, y)
"""


@pytest.mark.parametrize("side", ["end", "begin"])
def test_kernels_touch_nothing_beside_their_tensors(side):
    done = subprocess.run([sys.executable, str(HERE / "fenced_kernels.py"), side], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert ", 0 red" in done.stdout


@pytest.mark.parametrize(("side", "off", "ends"), [("end", 0, 0), ("end", 1, -signal.SIGSEGV), ("begin", -1, -signal.SIGSEGV)])
def test_what_touches_more_ends_its_process(tmp_path, side, off, ends):
    file = tmp_path / "beside.py"  # Triton reads the source of a kernel
    file.write_text(BESIDE.format(here=str(HERE), side=side, off=off))
    assert subprocess.run([sys.executable, str(file)], capture_output=True).returncode == ends


@pytest.mark.parametrize("side", ["end", "begin"])
def test_a_fenced_tensor_is_the_same_tensor(side):
    for one in (torch.randn(3, 5), torch.randn(2, 3, 4).half().transpose(1, 2), torch.arange(7)[::2], torch.tensor(3.0)):
        found = fenced(one, side)
        assert torch.equal(found, one) and found.stride() == one.stride() and found.dtype == one.dtype
