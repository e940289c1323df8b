"""Packages of the wheel, and the compiled extension `agd_fast._cuda` out of `csrc/` where there is a compiler for it.

Packages: `agd_fast`, and `agd_fast_kernels` out of `kernels/`, which is laid out as Hugging Face's kernel builder wants it.
`kernels/` has no `__init__.py`: at the repository root it would shadow Hugging Face's `kernels` package, which diffusers imports.

The extension is built where nvcc is; no GPU is asked for. AGD_FAST_BUILD_EXT=0 leaves it out, =1 makes it an error not to get it.
AGD_FAST_CUDA_ARCHS="90" or "80,90": for these alone.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
SOURCES = sorted(path.as_posix() for path in Path("csrc").glob("*.c*") if path.suffix in (".cu", ".cpp"))
WANTED = os.environ.get("AGD_FAST_BUILD_EXT", "")  # "", "0" or "1"

NINJA = """
flags = -O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off {compress}
rule kernel
  command = {nvcc} $flags {codes} --threads 2 -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule host
  command = {nvcc} $flags {includes} {defines} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {nvcc} -shared -cudart static -Xlinker --exclude-libs,ALL $in -o $out
"""


class BuildWithNvcc(build_ext):
    """Builds by ninja: kernels, bindings, and one library with CUDA's runtime in it."""

    def build_extension(self, ext: Extension) -> None:
        folder = Path(self.build_temp).resolve() / ext.name
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(rules(ext.sources, target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except (OSError, ImportError, RuntimeError, subprocess.CalledProcessError) as error:
            if WANTED == "1":
                raise
            warnings.warn(f"agd_fast._cuda was not built, PyTorch stands in for it: {error}", stacklevel=1)


def rules(sources: list[str], target: Path) -> str:
    """The build.ninja of a library of these sources."""
    import pybind11

    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("expected nvcc on PATH or in CUDA_HOME, found none")
    architectures = architectures_of(nvcc)
    codes = [f"-gencode arch=compute_{virtual_of(one)},code=sm_{one}" for one in architectures]
    ptx = virtual_of(architectures[-1])  # from which a driver makes code for later cards
    codes.append(f"-gencode arch=compute_{ptx},code=compute_{ptx}")
    includes = f"-I{quoted(sysconfig.get_path('include'))} -I{quoted(pybind11.get_include())}"
    named = " ".join([*(f"sm_{one}" for one in architectures), f"compute_{ptx}"])
    defines = f"""'-DAGD_FAST_ARCHITECTURES="{named}"'"""
    compress = "--compress-mode=size" if "--compress-mode" in output_of(nvcc, "--help") else ""
    lines = [NINJA.format(nvcc=quoted(nvcc), codes=" ".join(codes), includes=includes, defines=defines, compress=compress)]
    for source in sources:
        rule = "kernel" if source.endswith(".cu") else "host"
        lines.append(f"build {Path(source).name}.o: {rule} {escaped(Path(source).resolve())}\n")
    lines.append(f"build {escaped(target)}: link {' '.join(f'{Path(source).name}.o' for source in sources)}\n")
    return "".join(lines)


def virtual_of(architecture: str) -> str:
    """What it is compiled by way of: two of them, not one each, halve the time."""
    return "90" if int(architecture) >= 90 else "80"


def architectures_of(nvcc: str) -> list[str]:
    """Those that are wanted and that this nvcc compiles for, in order."""
    named = os.environ.get("AGD_FAST_CUDA_ARCHS", "").replace(",", " ").split()
    known = output_of(nvcc, "--list-gpu-code").split()
    found = [one for one in named or ARCHITECTURES if f"sm_{one}" in known]
    if not found or (named and found != named):
        raise RuntimeError(
            f"expected architectures that nvcc knows ({' '.join(known)}), found {' '.join(named or ARCHITECTURES)}"
        )
    return sorted(found, key=int)


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def find_nvcc() -> str | None:
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    candidates = [*(os.path.join(home, "bin", "nvcc") for home in homes), "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for one in candidates if (found := shutil.which(one))), None)


def quoted(path: str) -> str:
    return f"'{path}'".replace("$", "$$")


def escaped(path: Path) -> str:
    """As ninja reads a path."""
    return "".join(f"${sign}" if sign in "$ :" else sign for sign in path.as_posix())


def extensions() -> list[Extension]:
    if WANTED not in ("", "0", "1"):
        raise ValueError(f"AGD_FAST_BUILD_EXT must be 0 or 1 or not set, found {WANTED!r}")
    if WANTED == "0" or (WANTED == "" and find_nvcc() is None):
        return []
    return [Extension("agd_fast._cuda", SOURCES, optional=WANTED != "1")]


setup(
    packages=[*find_packages(include=["agd_fast", "agd_fast.*"]), "agd_fast_kernels"],
    package_dir={"agd_fast_kernels": "kernels/torch-ext/agd_fast_kernels"},
    package_data={
        "agd_fast": ["py.typed"],
        "agd_fast.datasets": ["assets/*", "assets/digits_teacher/*"],
        "agd_fast.reporting": ["*.jinja"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildWithNvcc},
)
