"""bench/speed/kernels.py and what is made of it: shapes, checks that see a wrong kernel, figures, and the GPU's part on fakes."""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import agd_fast_kernels.guidance_combine as module
import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from agd_fast.ops import OPS
from speed import kernel_checks, kernels
from speed.kernel_checks import Meta, check_case, checks
from speed.kernels import Case, Ceiling, Random, figures, flops, measure_case, odd_cases, real_cases, traffic

BENCH = Path(__file__).parents[1] / "bench"
KERNEL = module.guidance_combine_fwd
CASE = Case(OPS["guidance_combine"], "odd", {"C": 3, "H": 5, "W": 7})
CEILING = Ceiling(bandwidth=1e9, rate=1e12)


@pytest.mark.parametrize("case", [*odd_cases(), *real_cases()], ids=str)
def test_arguments_are_what_an_op_takes(case):
    args = case.arguments(Meta(torch.bfloat16), 4)
    case.op.reference(*args)
    assert case.op.limit(*args) == "" and "  " not in case.shape


def test_every_op_has_shapes():
    assert {case.op.name for case in odd_cases()} == {case.op.name for case in real_cases()} == set(OPS)
    assert {case.model for case in real_cases()} == {"sdxl-1024", "sd21-768", "dit-xl2-256", "sd3-medium-1024"}


@pytest.mark.parametrize("name", sorted(OPS))
@pytest.mark.parametrize("sliced", [False, True])
def test_kernels_pass_their_checks(name, sliced):
    case = next(case for case in odd_cases() if case.op.name == name)
    rows = list(check_case(case, 2, torch.float16, "cpu", sliced=sliced))
    assert [row["config"] for row in rows] == [dict(config) for config in case.op.configs()]
    assert all(row["ok"] for row in rows), rows


def off_by_a_little(*args, config=None):
    return KERNEL(*args, config=config) * (1 + 1e-3)


def unwritten(*args, config=None):
    return torch.empty_like(args[0])


def in_another_dtype(*args, config=None):
    return KERNEL(*args, config=config).double()


def into_its_argument(*args, config=None):
    found = KERNEL(*args, config=config)
    args[0].zero_()
    return found


def failing(*args, config=None):
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (off_by_a_little, "output 0: off by"),
        (unwritten, "output 0: off by nan"),
        (in_another_dtype, "expected torch.float32"),
        (into_its_argument, "arguments [0] were changed"),
        (failing, "RuntimeError: no such instruction"),
    ],
)
def test_checks_see_a_wrong_kernel(monkeypatch, wrong, reason):
    monkeypatch.setattr(module, "guidance_combine_fwd", wrong)
    rows = list(check_case(CASE, 2, torch.float32, "cpu"))
    assert rows and all(not row["ok"] and reason in row["reason"] for row in rows), rows


def test_checks_go_through_batches_dtypes_and_layouts(monkeypatch):
    seen = []
    monkeypatch.setattr("speed.kernel_checks.odd_cases", lambda: [CASE])
    monkeypatch.setattr("speed.kernel_checks.check_case", lambda *args, sliced: iter([seen.append((*args[1:3], sliced))]))
    list(checks(None, "cpu", odd=True))
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    expected = {(batch, dtype, False) for batch in (1, 4, 64) for dtype in dtypes} | {(4, dtype, True) for dtype in dtypes}
    assert len(seen) == len(expected) and set(seen) == expected


def test_figures_of_what_moves_memory():
    args = CASE.arguments(Random(torch.float32, "cpu"), 2)
    moved = 4 * (3 * 2 * 3 * 5 * 7 + 2)  # two predictions and ω in, one out
    assert traffic(args, OPS["guidance_combine"].reference(*args)) == moved
    found = figures(CASE.op, args, 0.01, CEILING)
    assert found["gb_per_s"] == pytest.approx(moved / 1e9 / 1e-5) and found["tflop_per_s"] is None
    assert found["share_of_ceiling"] == pytest.approx(moved / 1e9 / 1e-5)


def test_figures_of_a_product():
    case = Case(OPS["activated_linear"], "odd", {"T": 64, "C": 512, "N": 256, "activation": "gelu"})
    args = case.arguments(Random(torch.float32, "cpu"), 1)
    assert flops(case.op, args) == 2 * 64 * 512 * 256
    found = figures(case.op, args, 0.1, Ceiling(bandwidth=1e12, rate=1e12))
    assert found["tflop_per_s"] == pytest.approx(2 * 64 * 512 * 256 / 1e-4 / 1e12)
    assert found["share_of_ceiling"] == pytest.approx(found["tflop_per_s"])


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


class Graph:
    """What is called while it is captured is not called again."""

    replays = 0

    def replay(self):
        Graph.replays += 1
        time.sleep(1e-4)


@pytest.fixture
def fake_card(monkeypatch):
    """A card that is the CPU: kernels run in Triton's interpreter."""
    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    nothing = lambda *_: contextlib.nullcontext()  # noqa: E731
    fakes = {"Event": Event, "CUDAGraph": Graph, "Stream": stream, "current_stream": stream, "stream": nothing, "graph": nothing}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(kernels, "kernels_info", lambda: {"missing": ""})
    monkeypatch.setattr(kernels, "L2", 20_000)


def test_rows_of_a_case(fake_card):
    rows = measure_case(CASE, 2, CEILING, torch.float32, "cpu")
    configs = [dict(config) for config in CASE.op.configs()]
    assert [(row["arm"], row["config"]) for row in rows] == [
        ("eager", None),
        ("compiled", None),
        *(("kernel", c) for c in configs),
    ]
    for row in rows:
        assert row["note"] is None and 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["ms"] >= 0.1 / 24  # of one of the calls in a graph
        assert (row["op"], row["model"], row["shape"], row["batch"]) == ("guidance_combine", "odd", "C=3 H=5 W=7", 2)
    inputs = kernels.rotated(CASE, 2, torch.float32, "cpu")
    assert len(inputs) == math.ceil(20_000 / (4 * (2 * 2 * 3 * 5 * 7 + 2))) and not torch.equal(inputs[0][0], inputs[1][0])
    assert kernels.Pass(CASE.op.reference, inputs).calls == 24  # all of them, at least CALLS


def test_what_is_wrong_is_not_timed(fake_card, monkeypatch):
    monkeypatch.setattr(module, "guidance_combine_fwd", off_by_a_little)
    rows = measure_case(CASE, 2, CEILING, torch.float32, "cpu")
    assert all(("ms" in row) == (row["arm"] != "kernel") for row in rows)
    assert all("off by" in row["note"] for row in rows if row["arm"] == "kernel")


def test_more_shapes_are_compiled_than_pytorch_keeps(fake_card, monkeypatch):
    monkeypatch.setattr(kernels, "L2", 1)
    for width in range(1, 11):
        case = Case(OPS["guidance_combine"], "odd", {"C": 1, "H": 1, "W": width})
        ways = kernels.passes_of(case, kernels.rotated(case, 1, torch.float32, "cpu"), lambda name: name == "compiled")
        assert list(ways[0]) == ["compiled"] and not ways[1], width


def test_red_kernels_are_written_and_all_counted(tmp_path, monkeypatch):
    rows = [{"op": "a", "ok": True}, {"op": "a", "ok": False}, {"op": "b", "ok": True}]
    monkeypatch.setattr(kernel_checks, "checks", lambda *_, **__: iter(rows))
    monkeypatch.setattr("sys.argv", ["kernel_checks", "--device", "cpu", "--json", str(tmp_path / "checks.json")])
    with pytest.raises(SystemExit, match="True"):
        kernel_checks.main()
    found = json.loads((tmp_path / "checks.json").read_text())
    assert found["checked"] == 3 and found["rows"] == rows[1:2]


def test_pytest_benchmarks_every_op(tmp_path):
    """`pytest bench/ --benchmark-only`: all ops, and nothing else; the tests' own run leaves them out."""
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
    fast = ["--benchmark-max-time=0.01", "--benchmark-min-rounds=2", "--benchmark-warmup=off"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # it is no worker of xdist
    own |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "bench/", "--benchmark-only", f"--benchmark-json={path}", *fast],
        cwd=BENCH.parent,
        capture_output=True,
        text=True,
        env=own,
    )
    assert done.returncode == 0 and f"{len(OPS)} passed" in done.stdout, done.stdout + done.stderr
    assert "no CUDA device: one small shape an op on the CPU" in done.stdout
    found = json.loads(path.read_text())["benchmarks"]
    assert {one["name"].split("[")[1].split()[0] for one in found} == set(OPS)
    assert all(
        one["extra_info"] == {"device": "cpu", "dtype": "float32"} and "test_kernels.py" in one["fullname"] for one in found
    )
