"""What the built sdist and wheel hold, and that the wheel works in its own environment: `check_wheel.py DIST VENV`."""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

EXPECTED = {
    "agd_fast/py.typed",
    "agd_fast/datasets/assets/captions.txt",
    "agd_fast/memory/handlers/linear.py",
    "agd_fast/memory/ops/pack.py",
    "agd_fast/datasets/assets/digits_classifier.safetensors",
    "agd_fast/datasets/assets/digits_teacher/diffusion_pytorch_model.safetensors",
    "agd_fast/reporting/card.md.jinja",
    "agd_fast/reporting/report.html.jinja",
    "agd_fast_kernels/__init__.py",
    "agd_fast_kernels/guidance_combine.py",
    "agd_fast_kernels/projection_mix.py",
    "agd_fast_kernels/shapes.py",
}
SOURCES = {  # of the sdist; those of kernels/ make a package for the Kernel Hub
    "csrc/bindings.cpp",
    "csrc/codec.h",
    "csrc/pack.cu",
    "csrc/pack.cuh",
    "kernels/CARD.md",
    "kernels/README.md",
    "kernels/build.toml",
    "kernels/flake.nix",
    "kernels/torch-ext/agd_fast_kernels/guidance_combine.py",
    "LICENSE",
    "README.md",
}
LIMIT = 1_500_000  # bytes of a teacher with its classifier

USE = """
import agd_fast, agd_fast_kernels, importlib.util, torch
from pathlib import Path
here = Path(agd_fast.__file__)
assert {venv!r} in str(here), here
assert all(importlib.util.find_spec(f"agd_fast_kernels.{{name}}") for name in agd_fast.ops.OPS)
teacher = agd_fast.datasets.digits_teacher()
agd_fast.attach(teacher)
images = agd_fast.sample(teacher, class_labels=[3], guidance_scale=4.0, steps=2, seed=0)
assert images.shape == (1, 1, 8, 8) and torch.isfinite(images).all()
with agd_fast.frozen_backward(torch.nn.Linear(8, 8).requires_grad_(False), "4bit"):
    print("extension:", agd_fast.info()["environment"]["extension"])
print("wheel works:", here.parent.name, agd_fast.__version__)
"""


def main(dist: Path, venv: Path) -> None:
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= EXPECTED, f"the wheel lacks {EXPECTED - names}"
    foreign = {name.split("/")[0] for name in names} - {"agd_fast", "agd_fast_kernels"}
    assert all(name.endswith(".dist-info") for name in foreign), f"the wheel installs {foreign}"
    assets = sum(entry.file_size for entry in zipfile.ZipFile(wheel).infolist() if "/assets/" in entry.filename)
    assert assets <= LIMIT, f"assets are {assets} bytes, more than {LIMIT}"
    with tarfile.open(sdist) as archive:
        in_sdist = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert in_sdist >= SOURCES, f"the sdist lacks {SOURCES - in_sdist}"
    python = venv.resolve() / "bin" / "python"
    with tempfile.TemporaryDirectory() as elsewhere:
        subprocess.run([python, "-c", USE.format(venv=str(venv.resolve()))], check=True, cwd=elsewhere)
        subprocess.run([venv.resolve() / "bin" / "agd-fast", "--help"], check=True, cwd=elsewhere, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
