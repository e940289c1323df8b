"""kernels/ as a package for the Kernel Hub: its build file, its imports, and that it works under any name and from any folder."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from agd_fast_kernels import LAUNCHERS
from agd_fast_kernels.shapes import SHAPES

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, which has it as a package of its own
    tomllib = pytest.importorskip("tomli")

KERNELS = Path(__file__).parents[1] / "kernels"
BUILD = tomllib.loads((KERNELS / "build.toml").read_text())
PACKAGE = KERNELS / "torch-ext" / BUILD["general"]["name"].replace("-", "_")
MODULES = sorted(PACKAGE.rglob("*.py"))
CARD = (KERNELS / "README.md").read_text()


def test_build_file():
    """As kernel-builder takes it: a name that Python can have, known keys alone, Python files for every card."""
    general = BUILD["general"]
    assert set(BUILD) == {"general", "torch-noarch"} and BUILD["torch-noarch"] == {}
    assert set(general) == {"name", "version", "edition", "license", "backends", "hub"}
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", general["name"])
    assert (general["backends"], general["license"], general["edition"]) == (["cuda"], "MIT", 5)
    assert isinstance(general["version"], int) and general["hub"]["repo-id"].endswith(f"/{general['name']}")


def test_layout():
    assert PACKAGE.name == "agd_fast_kernels" and (PACKAGE / "__init__.py").is_file()
    assert [path.name for path in PACKAGE.parent.iterdir() if path.is_dir()] == [PACKAGE.name]
    assert "genKernelFlakeOutputs" in (KERNELS / "flake.nix").read_text()
    assert {name.removesuffix("_fwd") for name in LAUNCHERS} <= {path.stem for path in MODULES}


def foreign(source):
    """Modules that a kernel of the Hub may not import."""
    found = []
    for node in ast.walk(ast.parse(source, feature_version=(3, 9))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.append(node.module)
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    return [name for name in found if name.partition(".")[0] not in allowed]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports(path):
    assert foreign(path.read_text()) == []


def test_what_counts_as_a_foreign_import():
    source = "import os, torch.nn, numpy\nfrom triton import language\nfrom . import shapes\nfrom agd_fast_kernels import shapes"
    assert foreign(source) == ["numpy", "agd_fast_kernels"]
    with pytest.raises(SyntaxError):
        foreign("match 1:\n    case 1: pass")  # newer than the Hub's oldest Python


USE = """
import importlib.util, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("agd_fast", "agd_fast_kernels"):
            raise ModuleNotFoundError(f"{name} is not there")

sys.meta_path.insert(0, Refused())
import torch

def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, f"{folder}/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

one, other = (load(f"{name}_3f2a", sys.argv[1]) for name in ("kernel", "another"))
assert all(callable(getattr(one, name)) for name in one.LAUNCHERS)
assert one.ada_layer_norm_fwd is one.ada_layer_norm_fwd is not other.ada_layer_norm_fwd
shapes = importlib.import_module(".shapes", one.__name__)
try:
    shapes.require("ada_layer_norm", x=torch.zeros(2, 3, 4), gamma=torch.zeros(2, 5))
except ValueError as error:
    assert str(error) == "ada_layer_norm: gamma must be [2 or 1, 4], found [2, 5]", error
else:
    raise AssertionError("a wrong shape was taken")
x, gamma, beta = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(1, 4)
expected = torch.nn.functional.layer_norm(x, (4,)) * gamma[:, None] + beta
torch.testing.assert_close(one.ada_layer_norm_fwd(x, gamma, beta), expected)  # in Triton's interpreter
assert not {"agd_fast", "agd_fast_kernels"} & set(sys.modules)
print(len(one.LAUNCHERS), "launchers")
"""


def test_loads_under_another_name_from_another_folder(tmp_path):
    """As the Hub's loader does, twice in one process, where neither this library nor the package's own name can be imported."""
    shutil.copytree(PACKAGE, tmp_path / "build", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-c", USE, tmp_path / "build"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(LAUNCHERS)} launchers\n"


def test_card():
    """Its head as the Hub reads it; what the builder renders is the same file, and has nothing that it would fill in."""
    head, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", CARD, re.DOTALL).groups()
    about = yaml.safe_load(head)
    assert (about["library_name"], about["license"]) == ("kernels", "mit") and "triton" in about["tags"]
    general = BUILD["general"]
    assert f'get_kernel("{general["hub"]["repo-id"]}", version={general["version"]}' in body
    assert (KERNELS / "CARD.md").read_text() == CARD and "{{" not in CARD and "{%" not in CARD


def written(shape):
    """ "B|1 C" → "[B or 1, C]"."""
    return " or ".join(f"[{', '.join(size.replace('|', ' or ') for size in one.split())}]" for one in shape.split(" or "))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_card_has_the_signature(launcher):
    function = ast.parse((PACKAGE / f"{launcher.removesuffix('_fwd')}.py").read_text())
    (found,) = (node for node in function.body if isinstance(node, ast.FunctionDef) and node.name == launcher)
    defaults = [""] * (len(found.args.args) - len(found.args.defaults)) + [f"={ast.unparse(one)}" for one in found.args.defaults]
    arguments = ", ".join(arg.arg + default for arg, default in zip(found.args.args, defaults, strict=True))
    shapes = ", ".join(f"`{name}` {written(shape)}" for name, shape in SHAPES[launcher.removesuffix("_fwd")].items())
    arguments = arguments.replace("'", '"').replace("1e-05", "1e-5")
    (row,) = (line for line in CARD.splitlines() if line.startswith(f"| `{launcher}`"))
    assert row.startswith(f"| `{launcher}` | `{arguments}` | ") and row.endswith(f" | {shapes} |")
