"""Who decides whether an op runs on its kernel, by what, and what is kept of it."""

import json
import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from agd_fast_kernels.shapes import SHAPES, require

from agd_fast import ops
from agd_fast.ops import choice, defining
from agd_fast.ops.exactness import off
from agd_fast.ops.measuring import Verdicts, cache_dir, key_of, verdict_of
from agd_fast.ops.registry import OPS

x, gamma = torch.randn(2, 3, 4), torch.randn(2, 4)


def test_keys_tell_shapes_strides_dtypes_and_plain_arguments_apart():
    calls = [
        ("ada_layer_norm", (x, gamma, None, 1e-5)),
        ("norm_scores", (x, gamma, None, 1e-5)),
        ("ada_layer_norm", (x, gamma, None, 1e-6)),
        ("ada_layer_norm", (x, None, gamma, 1e-5)),
        ("ada_layer_norm", (x.half(), gamma.half(), None, 1e-5)),
        ("ada_layer_norm", (torch.randn(2, 4, 3).mT, gamma, None, 1e-5)),
        ("ada_layer_norm", (torch.randn(2, 5, 4), gamma, None, 1e-5)),
    ]
    keys = [key_of(*one) for one in calls]
    assert all(one != other for one, other in permutations(keys, 2))
    assert key_of("ada_layer_norm", (torch.zeros_like(x), gamma, None, 1e-5)) == keys[0]  # not by values


def test_verdicts_are_kept_and_merged_with_those_of_other_processes(tmp_path):
    path = tmp_path / "kernels" / "card.json"
    one, other = Verdicts(path), Verdicts(path)
    one.put("a", {"wins": True, "config": {"BLOCK": 1}})
    other.put("b", {"wins": False})
    assert Verdicts(path).found == {"a": {"wins": True, "config": {"BLOCK": 1}}, "b": {"wins": False}}
    assert other.get("a")["wins"] and one.get("b") is None and one.get("b", 1) == 1
    assert [file.name for file in path.parent.iterdir()] == ["card.json"]


@pytest.mark.parametrize("text", ['{"a": {"wi', "", "\xff\xfe", "[1, 2]"])
def test_a_torn_file_costs_measuring_again(tmp_path, text):
    path = tmp_path / "card.json"
    path.write_text(text, encoding="latin-1")
    if text.startswith("["):
        verdicts = Verdicts(path)
    else:
        with pytest.warns(UserWarning, match="measured again: .*card.json"):
            verdicts = Verdicts(path)
        with pytest.warns(UserWarning, match="measured again"):
            verdicts.put("a", {"wins": True})
    assert verdicts.found in ({}, {"a": {"wins": True}})
    verdicts.put("a", {"wins": True})
    assert json.loads(path.read_text()) == {"a": {"wins": True}}


def test_entries_that_are_no_verdicts_are_measured_again(tmp_path):
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"a": 5, "b": None, "c": {"wins": True}}))
    assert Verdicts(path).found == {"c": {"wins": True}}


def test_a_place_that_cannot_be_looked_at_costs_a_warning(tmp_path):
    """As the home of somebody else; a name that is too long is refused to all, root included."""
    with pytest.warns(UserWarning, match="measured again"):
        verdicts = Verdicts(tmp_path / ("x" * 300))
    with (
        pytest.warns(UserWarning, match="kept for this process only"),
        pytest.warns(UserWarning, match="measured again"),
    ):
        verdicts.put("a", {"wins": True})
    assert verdicts.found == {"a": {"wins": True}}


def test_a_folder_that_cannot_be_written_to_costs_keeping(tmp_path):
    (tmp_path / "file").write_text("no folder")
    verdicts = Verdicts(tmp_path / "file" / "card.json")
    with pytest.warns(UserWarning, match="kept for this process only"):
        verdicts.put("a", {"wins": True})
    assert verdicts.get("a") == {"wins": True}


def test_where_verdicts_are_kept(monkeypatch, tmp_path):
    monkeypatch.delenv("AGD_FAST_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "agd_fast"
    monkeypatch.setenv("AGD_FAST_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("AGD_FAST_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "agd_fast"


def test_a_user_without_a_home_has_a_place_for_verdicts(monkeypatch):
    """As containers run under numbers that nobody knows."""
    monkeypatch.delenv("AGD_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert cache_dir().is_absolute() and cache_dir().name == "agd_fast"


CONFIGS = {"one": {"BLOCK": 1}, "two": {"BLOCK": 2}}


def test_the_fastest_configuration_wins_only_against_eager_and_compiled():
    times = {"eager": 3.0, "compiled": 2.0, "one": 1.5, "two": 1.0}
    assert verdict_of(times, CONFIGS, []) == {"milliseconds": times, "wins": True, "config": {"BLOCK": 2}}
    for torch_way in ("eager", "compiled"):
        slower = {**times, torch_way: 0.5}
        found = verdict_of(slower, CONFIGS, [])
        assert not found["wins"] and found["reason"] == "torch takes 0.5 ms, its kernel 1 ms"
    assert not verdict_of({"eager": 1.0, "two": 1.0}, CONFIGS, [])["wins"]  # a draw


def test_what_is_wrong_or_does_not_run_does_not_win():
    found = verdict_of({"eager": 3.0}, CONFIGS, ["one is off the reference", "two failed (no)"])
    assert found == {"milliseconds": {"eager": 3.0}, "wins": False, "reason": "one is off the reference; two failed (no)"}
    assert not verdict_of({"eager": 3.0, "one": 1.0}, CONFIGS, ["compiled failed (no compiler)"])["wins"]


def test_what_was_measured_is_not_measured_again_and_what_could_not_be_is(tmp_path):
    verdicts, runs = Verdicts(tmp_path / "card.json"), []

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    found = choice.measured(verdicts, "op", fails)
    assert found == {"wins": False, "reason": "could not be measured (OutOfMemoryError: CUDA out of memory)"}
    partial, whole = ({"wins": True, "milliseconds": dict.fromkeys(names, 1.0)} for names in (["eager"], ["eager", "compiled"]))
    assert choice.measured(verdicts, "op", lambda: partial) == partial
    for _ in range(2):
        assert choice.measured(verdicts, "op", lambda: runs.append(1) or whole) == whole
    assert runs == [1]
    assert Verdicts(verdicts.path).found == {"op": whole}


def test_a_result_off_the_reference_is_seen():
    exact = [torch.randn(1000).double()]
    plain = [exact[0].half()]
    assert off(plain, plain, exact) == ""
    assert "off by" in off([plain[0] * 1.02], plain, exact)
    assert "off by nan" in off([plain[0] * math.nan], plain, exact)


def test_reasons_to_leave_an_op_to_torch():
    norm, scores = ops.ada_layer_norm, ops.projection_scores
    assert choice.refusal(norm, (x, gamma, None), "always") == ""
    assert choice.refusal(norm, (x, gamma, None), "never") == "kernels are switched off"
    assert choice.refusal(norm, (x, gamma, None), "auto") == "tensors on cpu"
    assert choice.refusal(norm, (x.double(), gamma.double(), None), "always") == "torch.float64 tensors"
    many = (x, torch.randn(5, 4), None, torch.randn(2, 129, 4), None)
    assert "129 scores" in choice.refusal(scores, many, "always")
    assert "2 heads" in choice.refusal(scores, (*many[:3], torch.randn(2, 4, 4), None, 2), "always")
    rank = (x, x, torch.randn(65, 4), torch.randn(4, 65), None)
    assert "rank of 65" in choice.refusal(OPS["gated_lora"], rank, "always")


def test_joins_follow_the_policy():
    thin, wide = torch.randn(2, 4), torch.randn(8, 4)
    found = [choice.refusal_of_join(x, thin, wide, policy) for policy in ("always", "never", "auto")]
    assert found == ["", "kernels are switched off", "tensors on cpu"]


def test_a_kernel_that_does_not_run_is_done_without_and_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(choice, "_failed", {})
    args, broken = (x, gamma, None, 1e-5), replace(ops.ada_layer_norm, name="without_a_kernel")
    with pytest.warns(UserWarning, match=r"without_a_kernel runs in torch: its kernel failed \("):
        found = choice.launched(broken, args)
    assert torch.equal(found, ops.ada_layer_norm.reference(*args))
    assert torch.equal(choice.run(broken, args), found)
    assert not recwarn
    assert "its kernel failed" in choice.refusal(broken, args, "always")
    assert ops.kernels_info()["failed"].keys() == {"without_a_kernel"}
    assert choice.refusal(ops.gated_residual, (x, x, gamma), "always") == ""


def test_wrong_arguments_and_no_memory_cost_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "_failed", {})
    monkeypatch.setattr(Verdicts, "of_this_card", lambda: Verdicts(tmp_path / "card.json"))
    with pytest.raises(ValueError, match="gamma must be"):
        choice.launched(Raising(ValueError("wrong")), (x, torch.randn(3, 4), None))
    found = choice.launched(Raising(torch.OutOfMemoryError("full")), (x, gamma, None))
    assert torch.equal(found, ops.ada_layer_norm.reference(x, gamma, None))
    assert not choice._failed


class Raising:
    """An op whose kernel raises."""

    name, reference = "raising", staticmethod(ops.ada_layer_norm.reference)

    def __init__(self, error):
        self.error = error

    def kernel(self):
        raise self.error


def test_an_operator_is_asked_for_under_the_key_that_it_was_measured_by(monkeypatch):
    seen = []
    op = ops.activated_linear
    arguments = (x, torch.randn(6, 4), None, "geglu")
    monkeypatch.setattr(defining, "run", lambda op, args: seen.append(key_of(op.name, args)) or choice.run(op, args))
    op(*arguments)
    op(*arguments[:3])
    assert seen == [key_of(op.name, op.complete(arguments))] * 2 and "'geglu'" in seen[0]


def test_what_there_is_to_say_without_a_gpu(monkeypatch):
    found = ops.kernels_info()
    assert found["ops"] == sorted(OPS) and found["failed"] == {}
    if not torch.cuda.is_available():
        assert found["missing"] == "no CUDA device" and "kept" not in found
    monkeypatch.setenv("AGD_FAST_KERNELS", "never")
    assert ops.kernels_info()["policy"] == "never"


def test_every_op_has_shapes_a_kernel_and_its_configurations():
    assert {name.removesuffix("_channels_first") for name in SHAPES} == OPS.keys()
    for op in OPS.values():
        assert callable(op.kernel()) and len(op.configs()) > 0 and op.launches >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": torch.randn(3, 4)}, r"ada_layer_norm: gamma must be \[2 or 1, 4\], found \[3, 4\]"),
        ({"gamma": torch.randn(2, 5)}, r"gamma must be \[2 or 1, 4\], found \[2, 5\]"),
        ({"gamma": torch.randn(4)}, r"gamma must be \[2 or 1, 4\], found \[4\]"),
        ({"x": torch.randn(4)}, r"x must be \[B, \.\.\., C\], found \[4\]"),
        ({"gamma": gamma.half()}, r"gamma must be torch.float32 on cpu, found torch.float16 on cpu"),
        ({"gamma": gamma.to("meta")}, r"gamma must be torch.float32 on cpu, found torch.float32 on meta"),
        ({"x": torch.ones(2, 3, 4).long(), "gamma": gamma.long()}, r"expected floating-point tensors, found torch.int64"),
    ],
)
def test_wrong_shapes_name_the_argument_and_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        require("ada_layer_norm", **{"x": x, "gamma": gamma, "beta": None, **arguments})


def test_any_number_of_sizes_is_the_same_wherever_it_stands():
    for sizes in ((), (3,), (3, 5)):
        tokens = torch.randn(2, *sizes, 4)
        require("gated_residual", residual=tokens, y=tokens, gate=gamma, P=torch.randn(2, *sizes, 6), U=torch.randn(2, 6, 4))
    given = {"residual": x, "y": x, "gate": gamma[:1], "P": torch.randn(2, 3, 6), "U": torch.randn(2, 6, 4)}
    for name, other, expected in (
        ("y", torch.randn(2, 5, 4), r"y must be \[2, 3, 4\], found \[2, 5, 4\]"),
        ("y", torch.randn(2, 3, 1, 4), r"y must be \[2, 3, 4\], found \[2, 3, 1, 4\]"),
        ("P", torch.randn(2, 6), r"P must be \[2, 3, S\], found \[2, 6\]"),
        ("U", torch.randn(2, 5, 4), r"U must be \[2, 6, 4\], found \[2, 5, 4\]"),
        ("U", torch.randn(1, 6, 4), r"U must be \[2, 6, 4\], found \[1, 6, 4\]"),
        ("U", torch.randn(2, 6, 4).double(), r"U must be torch.float32 on cpu, found torch.float64 on cpu"),
    ):
        with pytest.raises(ValueError, match=f"^gated_residual: {expected}$"):
            require("gated_residual", **{**given, name: other})


def test_shapes_with_alternatives():
    W = torch.randn(6, 4)
    for bias in (None, torch.randn(6), torch.randn(2, 6)):
        require("activated_linear", x=x, weight=W, bias=bias)
    with pytest.raises(ValueError, match=r"bias must be \[6\] or \[2, 6\], found \[3, 6\]"):
        require("activated_linear", x=x, weight=W, bias=torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"omega must be torch.float32"):
        require("guidance_combine", uncond=x.half(), cond=x.half(), omega=torch.ones(2).half())
    with pytest.raises(ValueError, match=r"score_bias must be \[2, 1, 5\], found \[2, 5, 1\]"):
        require("norm_scores", x=x, gamma=None, beta=None, A=torch.randn(2, 5, 4), score_bias=torch.randn(2, 5, 1))
