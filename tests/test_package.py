"""What `import agd_fast` gives, and what it does not wait for."""

import ast
import subprocess
import sys
from importlib import import_module

import pytest

import agd_fast

IMPORTS = """
import sys, agd_fast, agd_fast.cli
print(*sys.modules)
agd_fast.distill, agd_fast.evaluate_pipeline, agd_fast.load
print(*sys.modules)
"""


def test_import_waits_for_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    first, then = (set(line.split()) for line in done.stdout.splitlines())
    plots = {"torchmetrics", "matplotlib"}  # what measuring and drawing need alone
    assert not first & {"torch", "diffusers", "accelerate", "peft", "transformers", "scipy.stats", *plots}
    assert "diffusers" in then and not then & plots


def test_names_are_those_that_are_typed():
    with open(agd_fast.__file__, encoding="utf-8") as file:
        typed = next(node for node in ast.parse(file.read()).body if isinstance(node, ast.If))
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert sorted([*homes, "__version__"]) == agd_fast.__all__
    for name, home in homes.items():
        assert getattr(agd_fast, name) is getattr(import_module(home), name)
    assert set(agd_fast.__all__) <= set(dir(agd_fast))


def test_rooms_are_found_and_nothing_else():
    assert not {"find_spec", "import_module"} & {*dir(agd_fast)}
    assert agd_fast.__getattr__("schedule") is import_module("agd_fast.schedule")  # as where nobody imported it before
    with pytest.raises(AttributeError, match="module 'agd_fast' has no attribute 'distil'"):
        agd_fast.distil  # noqa: B018
