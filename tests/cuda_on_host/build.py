"""The kernels of csrc/ for a CPU, as a module like `agd_fast._cuda`, with AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w", *SANITIZERS]


def with_calls(source: str) -> str:
    """CUDA C++ with `kernel<<<blocks, threads, 0, stream>>>(arguments)` as calls of `on_host::launch`."""
    while (opening := source.find("<<<")) >= 0:
        begin = max(source.rfind(sign, 0, opening) for sign in ";{}") + 1
        closing = source.index(">>>", opening)
        blocks, threads, *_ = _split(source[opening + 3 : closing])
        end = _end_of_parentheses(source, closing + 3)
        kernel, arguments = source[begin:opening].strip(), source[closing + 3 : end]
        call = f" on_host::launch({blocks}, {threads}, [&] {{ {kernel}{arguments}; }})"
        source = source[:begin] + call + source[end:]
    return source


def _split(text: str) -> list[str]:
    """At the commas that are in no parentheses."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _end_of_parentheses(source: str, start: int) -> int:
    depth = 0
    for index in range(start, len(source)):
        depth += (source[index] == "(") - (source[index] == ")")
        if not depth:
            return index + 1
    raise ValueError(f"expected the end of a call, found none after {source[start : start + 40]!r}")


def build(folder: Path) -> Path:
    """Compile into a folder; the module's file. Raises: RuntimeError with what the compiler says."""
    for source in CSRC.iterdir():
        (folder / source.name).write_text(f'#line 1 "{source}"\n{with_calls(source.read_text())}')
    sources = [*folder.glob("*.cu"), *folder.glob("*.cpp"), HERE / "on_host.cpp"]
    includes = [f"-I{one}" for one in (folder, HERE, pybind11.get_include(), sysconfig.get_path("include"))]
    defines = ["-include", "on_host.h", '-DAGD_FAST_ARCHITECTURES="a CPU"']

    def compiled(source: Path) -> str:
        target = folder / f"{source.name}.o"
        _run("g++", *FLAGS, *includes, *defines, "-c", "-x", "c++", str(source), "-o", str(target))
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run("g++", "-shared", *SANITIZERS, *objects, "-o", str(module))
    return module


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
