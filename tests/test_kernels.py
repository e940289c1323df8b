"""Triton kernels without a GPU: in the interpreter against float32 references, and compiled ahead of time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agd_fast import ops


def in_process(script, **environment):
    """Run code in a process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated."""
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


INTERPRETED = """
import itertools, torch
from agd_fast.ops import guidance_combine_ref
from agd_fast_kernels.guidance_combine import guidance_combine_fwd
torch.manual_seed(0)
empty = torch.empty_like
torch.empty_like = lambda x: empty(x).fill_(float("nan"))  # what the kernel does not write shows
shapes = [(1, 1), (3, 7), (2, 4, 9, 5), (5, 1, 41, 31), (2, 1023), (2, 1024), (2, 1025), (0, 4), (4, 0)]
for shape, dtype in itertools.product(shapes, (torch.float32, torch.float16)):
    wide = torch.randn(2, *shape, 2).to(dtype)
    for u, c in ((wide[0, ..., 0].contiguous(), wide[1, ..., 0].contiguous()), (wide[0, ..., 0], wide[1, ..., 1])):
        omega = 1 + 5 * torch.rand(shape[0])
        expected = guidance_combine_ref(u.float(), c.float(), omega)
        plain = guidance_combine_ref(u, c, omega)
        found = guidance_combine_fwd(u, c, omega)
        assert found.shape == plain.shape and found.dtype == dtype and torch.isfinite(found).all()
        if found.numel():
            error, allowed = (found.float() - expected).abs().max(), (plain.float() - expected).abs().max()
            assert error <= 2 * allowed + 1e-6, (shape, dtype, error, allowed)
print("interpreted")
"""

COMPILED = """
import re, subprocess, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from agd_fast_kernels.guidance_combine import BLOCK, guidance_combine_fwd_kernel
quiet = {"capture_output": True, "text": True, "check": True}
tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
for capability in (80, 90, 100, 120):
    for dtype in ("fp32", "fp16", "bf16"):
        types = {name: f"*{dtype}" for name in ("uncond", "cond", "out")}
        signature = {**types, "omega": "*fp32", "size": "i32", "BLOCK": "constexpr"}
        source = ASTSource(guidance_combine_fwd_kernel, signature, constexprs={"BLOCK": BLOCK})
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary)
            file.flush()
            usage = subprocess.run([tool, "--dump-resource-usage", file.name], **quiet).stdout
        stack, local = (int(re.search(name + r":(\\d+)", usage).group(1)) for name in ("STACK", "LOCAL"))
        assert stack == local == 0, usage
print("compiled")
"""


def test_guidance_combine_fwd_interpreted():
    assert "interpreted" in in_process(INTERPRETED, TRITON_INTERPRET="1")


def test_guidance_combine_fwd_compiles_ahead_of_time():
    assert "compiled" in in_process(COMPILED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cond": torch.zeros(2, 4)}, "cond must be"),
        ({"omega": torch.zeros(3)}, "omega must be"),
        ({"omega": torch.zeros(2).double()}, "float32"),
    ],
)
def test_guidance_combine_fwd_names_the_argument(change, message):
    from agd_fast_kernels.guidance_combine import guidance_combine_fwd

    arguments = {"uncond": torch.zeros(2, 3), "cond": torch.zeros(2, 3), "omega": torch.zeros(2), **change}
    with pytest.raises(ValueError, match=message):
        guidance_combine_fwd(**arguments)


def test_kernels_missing_says_why(monkeypatch):
    monkeypatch.setenv("AGD_FAST_KERNELS", "1")
    assert ops.kernels_wanted() == torch.cuda.is_available()
    assert torch.cuda.is_available() or ops.kernels_missing() == "no CUDA device"
