"""bench/memory_overhead.py: host times of narrow models, and the packing ops without their kernels."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import memory_overhead
from agd_fast.files import read_json
from agd_fast.memory import ops
from memory import overhead

SHALLOW = replace(overhead.narrow("dit-xl2-256"), config={**overhead.narrow("dit-xl2-256").config, "num_layers": 1})


@pytest.fixture
def shallow(monkeypatch):
    monkeypatch.setattr(overhead, "narrow", lambda name: SHALLOW)


@pytest.mark.usefixtures("shallow")
def test_a_row_a_way(monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.json"
    monkeypatch.setattr(memory_overhead, "commit", lambda: "0")
    monkeypatch.setattr(sys, "argv", ["memory_overhead.py", "--model", "dit-xl2-256", "--rounds", "2", "--json", str(path)])
    memory_overhead.main()
    rows = read_json(path)["rows"]
    assert [row["way"] for row in rows] == [*overhead.WAYS] * 2
    assert [row["packing"] for row in rows] == ["launched"] * len(overhead.WAYS) + ["in PyTorch"] * len(overhead.WAYS)
    for row in rows:
        assert 0 < row["forward_cpu_ms"]["p20"] <= row["forward_cpu_ms"]["median"] <= row["forward_cpu_ms"]["p80"]
        assert row["forward_wall_ms"]["median"] < row["pass_wall_ms"]["median"]
        assert 0 < row["forward_launches"] < row["pass_launches"]
    launches = {row["way"]: row["pass_launches"] for row in rows}
    assert launches["plain"] < launches["checkpointing"] and launches["exact"] < launches["8bit"] < launches["blocks"]
    assert "forward + backward CPU ms" in capsys.readouterr().out


def test_launched_ops_run_their_launchers_and_are_themselves_again():
    x = torch.randn(64)
    expected = ops.pack_ref(x, 8, 64)
    with overhead.launched():
        assert all(map(has_kernel, ops.LAUNCHERS))
        found = ops.pack(x, 8, 64)
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    assert not any(map(has_kernel, ops.LAUNCHERS)) and all(map(torch.equal, ops.pack(x, 8, 64), expected))


def has_kernel(op):
    """Of its own for the CPU, beside the reference."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.NAMESPACE}::{op}", "CPU")


@pytest.mark.parametrize("name", overhead.MODELS)
def test_narrow_models_are_as_deep_as_the_public_ones(name):
    full, narrow = overhead.ARCHITECTURES[name].config, overhead.narrow(name).config
    assert all(narrow.get(key) == full.get(key) for key in ("num_layers", "transformer_layers_per_block", "down_block_types"))
    assert overhead.narrow(name).conditions.keys() == overhead.ARCHITECTURES[name].conditions.keys()
