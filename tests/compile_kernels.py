"""Compile the kernels of an op ahead of time for every architecture, and check what each needs: `compile_kernels.py OP`.

A process of its own: Triton reads TRITON_INTERPRET when a kernel is decorated. Launches are recorded, on CPU tensors, and
specialised as Triton itself would.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from helpers_kernels import CASES, configs, launcher

SHARED = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # compute capability → bytes that a block may have
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


def launches(op_name: str) -> list[Launch]:
    """Of every config, dtype and case."""
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((kernel, args, kwargs))

    with patch.object(JITFunction, "run", record):
        for dtype in DTYPES:
            for case in CASES[op_name](dtype):
                for config in configs(op_name):
                    launcher(op_name)(*case, config=config)
    return found


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    kernel, args, kwargs = launch
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    _, signature, constexprs, attrs = kernel._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(kernel, signature, constexprs, attrs), {"enable_fp_fusion": True, **options}


def check(source: ASTSource, options: dict[str, Any], target: GPUTarget) -> None:
    compiled = triton.compile(source, target=target, options=options)
    what = f"{source.fn.__name__} {source.constants} {source.signature} {options} on sm_{target.arch}"
    assert compiled.metadata.shared <= SHARED[target.arch], f"{what}: {compiled.metadata.shared} bytes of shared memory"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("STACK", "LOCAL"):
        assert re.search(name + r":(\d+)", usage).group(1) == "0", f"{what}: registers spilled: {usage}"
    registers = re.search(r"REG:(\d+)", usage).group(1)
    print(f"{what}: {registers} registers, {compiled.metadata.shared} bytes of shared memory")


def main(op_name: str) -> None:
    recorded, seen = launches(op_name), set()
    assert recorded, f"{op_name}: no case launches a kernel"
    for capability in SHARED:
        target = GPUTarget("cuda", capability, 32)
        for launch in recorded:
            source, options = specialised(launch, target)
            key = (capability, source.hash(), str(sorted(options.items())))
            if key not in seen:
                check(source, options, target)
                seen.add(key)
    print(f"{op_name}: {len(seen)} compiled")


if __name__ == "__main__":
    main(sys.argv[1])
