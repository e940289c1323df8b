"""bench/distill_memory.py and bench/gradient_error.py: counted rows, real steps on the CPU, the budget on paper, gradients."""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import agd_fast as agd
import distill_memory
import gradient_error
from agd_fast.distillation import graphed
from agd_fast.files import read_json
from agd_fast.memory import MODES
from memory import rows as memory_rows
from memory import training, whole
from memory.budget import MODELS, budget
from memory.budget import MODES as ON_PAPER
from memory.ideas import IDEAS, NOT_TAKEN, Way
from memory.outliers import inject_outliers
from memory.rows import KEY, WAYS, count_row, empty_row, key, print_rows
from speed.architectures import ARCHITECTURES, build
from test_counting import TINY
from tiny import FAMILIES

DIT = ARCHITECTURES["dit-xl2-256"]
SMALL = replace(DIT, config={**DIT.config, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2})
ROW = {"model": "tiny", "batch": 1, "adapter": "default", "dtype": "float32", "base": None, "optimizer": None}
ROW |= {"device": "meta", "cap_bytes": None, "search": False}


def row(mode, **changed):
    return {**ROW, "mode": mode, **changed}


def test_counted_rows():
    rows = {mode: count_row(row(mode), SMALL) for mode in WAYS}
    assert all(set(found) == {*KEY, *memory_rows.FIGURES} and not found["note"] for found in rows.values())
    kept = {mode: found["saved_bytes"] for mode, found in rows.items()}
    assert kept["eager"] > kept["exact"] > kept["8bit"] > kept["4bit"] >= kept["recompute"] > 0
    assert kept["eager"] > kept["mincut"] > 0 and kept["eager"] > kept["checkpointing"] > 0
    assert all(sum(found["by_op"].values()) == found["saved_bytes"] for found in rows.values())
    assert rows["mincut"]["peak_bytes"] is None and rows["eager"]["peak_bytes"] > rows["4bit"]["peak_bytes"] > kept["4bit"]
    assert rows["eager"]["seconds_per_step"] is None
    flops = {mode: found["flops"] for mode, found in rows.items()}
    assert flops["eager"] < flops["exact"] == flops["8bit"] == flops["4bit"] < flops["recompute"] and flops["mincut"] is None
    assert 1.3 * flops["eager"] < flops["checkpointing"] < 1.7 * flops["eager"]  # a second forward; that of adapters is dear here


@pytest.mark.parametrize("adapter", ["cross_attention", "reference"])
def test_other_adapters_are_counted(adapter):
    found = count_row(row("eager", adapter=adapter), SMALL)
    assert found["saved_bytes"] > 0 and found["parameters"] != count_row(row("eager"), SMALL)["parameters"]


CASES = [("dit-xl2-256", "recompute"), ("sd21-768", "eager")]


@pytest.mark.parametrize(("model", "mode"), CASES)
def test_the_budget_on_paper_is_what_is_counted(model, mode):
    found = count_row(row(mode, model=model, dtype="bfloat16"))
    assert found["budget_bytes"] == budget(model, mode)
    assert found["saved_bytes"] == pytest.approx(budget(model, mode), rel=0.05)


def test_the_budget_of_each_mode_is_below_that_before():
    for model in MODELS:
        sizes = [budget(model, mode) for mode in ON_PAPER]
        assert sizes == sorted(sizes, reverse=True) and len({*sizes}) == len(sizes)


@pytest.mark.parametrize("mode", ["eager", "checkpointing", "4bit"])
def test_real_steps(mode):
    found = training.train_row(row(mode, device="cpu", batch=2), seconds=0.0, architecture=SMALL)
    assert found["note"] is None and found["images_per_second"] == pytest.approx(2 / found["seconds_per_step"])
    assert found["peak_bytes"] is None and found["loss"] == found["loss"] > 0


def test_steps_on_a_packed_base():
    found = training.train_row(row("4bit", device="cpu", base="int8"), seconds=0.0, architecture=SMALL)
    assert found["note"] is None and found["loss"] > 0


def test_graphed_steps_are_rows_of_their_own(monkeypatch, capsys):
    """A graph that is no graph: what it was made of runs once more."""
    monkeypatch.setattr(graphed, "GraphMemory", lambda device: None)

    def record(self, run, memory):
        self.run, self.graph = run, argparse.Namespace(replay=lambda: runs.append(run()))

    runs = []
    monkeypatch.setattr(graphed.PassGraph, "_record", record)
    plain, found = (training.train_row(row("4bit", device="cpu", graphed=one), 0.0, SMALL) for one in (False, True))
    assert found["graphed"] and found["note"] is None and found["loss"] == pytest.approx(plain["loss"], rel=0.01)
    assert len(runs) == 1 + training.IMAGES
    assert key(found) != key(plain) == key({name: value for name, value in plain.items() if name != "graphed"})
    print_rows([plain, found])
    assert capsys.readouterr().out.count("4bit, graphed") == 1
    monkeypatch.setattr(graphed.PassGraph, "_record", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="goes on without CUDA graphs"):
        failed = training.train_row(row("4bit", device="cpu", graphed=True), 0.0, SMALL)
    assert failed["note"] == "no graph of a pass could be made (division by zero)" and failed["loss"] > 0


@pytest.mark.parametrize(("room", "told"), [(1, 1), (2, 2), (5, 5), (5, 9), (5, 1), (100, 100), (100, 109), (100, 80)])
def test_the_largest_batch_that_fits(room, told, monkeypatch):
    """told: what the memory of two small batches says of it."""
    tried = []

    def peak(self, batch):
        tried.append(batch)
        return None if batch > room else 1000 + 10 * batch

    monkeypatch.setattr(training, "_peak", peak)
    monkeypatch.setattr(training, "_measure", lambda training, batch, *_: {"images_per_second": float(batch)})
    wanted = row("eager", device="cpu", search=True, cap_bytes=1000 + 10 * told)
    monkeypatch.setattr(training, "cap", lambda *_: None)
    found = training.train_row(wanted, 0.0, SMALL)
    assert room - max(1, room // 16) <= found["batch"] <= room and found["note"] is None
    assert len(tried) == len({*tried}) <= (6 if told >= room else 9)


def test_running_out_of_memory_is_a_note(monkeypatch):
    def steps(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "_steps", steps)
    found = training.train_row(row("eager", device="cpu", search=True), 0.0, SMALL)
    assert found["note"] == "out of memory: not even a batch of 1 fits" and found["images_per_second"] is None


def run(monkeypatch, *options):
    monkeypatch.setitem(ARCHITECTURES, "tiny", SMALL)
    monkeypatch.setattr(sys, "argv", ["distill_memory.py", "--model", "tiny", *map(str, options)])
    distill_memory.main()


def test_what_the_json_holds_is_not_measured_again(monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--device", "meta", "--adapter", "default", "--json", path]
    run(monkeypatch, *options, "--modes", "eager")
    first = read_json(path)
    assert [found["mode"] for found in first["rows"]] == ["eager"] and first["commit"] and first["environment"]["torch"]
    monkeypatch.setattr(distill_memory, "count_row", lambda row: {**empty_row(row), "saved_bytes": 7})
    run(monkeypatch, *options, "--modes", "eager", "exact", "--minutes", 0)
    assert read_json(path)["rows"] == first["rows"] and "no time left for 1 of 2 rows" in capsys.readouterr().err
    run(monkeypatch, *options, "--modes", "eager", "exact")
    assert [found["saved_bytes"] for found in read_json(path)["rows"]] == [first["rows"][0]["saved_bytes"], 7]


def test_rows_of_a_card_are_processes_of_their_own(monkeypatch, tmp_path, capsys):
    path = tmp_path / "out.json"
    options = ["--device", "cpu", "--adapter", "default", "--modes", "eager", "4bit", "--json", path]
    commands = []

    def process(command, timeout):
        commands.append(command)
        return argparse.Namespace(returncode=-9)

    monkeypatch.setattr(distill_memory.subprocess, "run", process)
    monkeypatch.setattr(distill_memory, "commit", lambda: "0")
    monkeypatch.setattr(distill_memory, "gpu_state", dict)
    run(monkeypatch, *options)
    assert len(commands) == 2 and all(found["note"] == "its process ended with -9" for found in read_json(path)["rows"])
    assert "its process ended with -9" in capsys.readouterr().out


def test_a_batch_that_was_searched_for_is_found_again():
    wanted = row("eager", search=True)
    assert key({**wanted, "batch": 21}) == key(wanted) != key({**wanted, "search": False})
    assert key(row("eager", batch=2)) != key(row("eager"))


@pytest.mark.parametrize(("text", "size"), [("8GiB", 2**33), ("0.5 GiB", 2**29), ("24GB", 24 * 10**9)])
def test_sizes(text, size):
    assert distill_memory.size_of(text) == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images-per-second", "--device", "cuda"], "expected --budget beside --images-per-second"),
        (["--images-per-second", "--budget", "8GiB", "--device", "meta"], "expected a card for --images-per-second"),
        (["--cap", "8"], "expected a size such as 8GiB"),
        (["--whole", "--device", "cpu"], "--whole goes with a device and with models of sdxl-1024"),
        (["--graphed", "--device", "meta"], "--graphed goes with training steps on a device"),
        (["--model", "sdxl"], "expected a model of"),
    ],
)
def test_wrong_options(options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, *options)
    assert message in capsys.readouterr().err


def test_the_table_shows_what_there_is(capsys):
    print_rows([{**empty_row(row("eager")), "saved_bytes": 2**30}, {**empty_row(row("exact")), "note": "why"}])
    shown = capsys.readouterr().out
    assert "1.000" in shown and "kept GiB" in shown and "images / s" not in shown and "default, exact, batch 1: why" in shown


@pytest.fixture
def case(monkeypatch):
    monkeypatch.setattr(gradient_error, "SMALL", replace(TINY, sample=(4, 16, 16)))
    return gradient_error.load(argparse.Namespace(teacher=None, model=None, batch=2, kind=None, steps=2))


def test_gradient_errors(case):
    ways = {"eager": Way(), "exact": Way(MODES["exact"]), "4bit": Way(MODES["4bit"]), "bf16": Way(autocast=True)}
    rows = {found["way"]: found for found in gradient_error.measure([case], ways)}
    assert rows["eager"]["relative_error"] == rows["eager"]["outliers_relative_error"] == 0
    assert rows["exact"]["relative_error"] < 1e-5 < rows["4bit"]["relative_error"] < 0.2
    assert rows["4bit"]["cosine"] > 0.99 and rows["bf16"]["relative_error"] > 1e-4
    assert rows["4bit"]["same_output"] and rows["4bit"]["outliers_same_output"] and not rows["bf16"]["same_output"]


def test_ideas_end_in_the_modes_and_keep_less_and_less():
    ends = [way.kept for way in IDEAS.values() if way.handlers is None]
    assert [mode for mode in MODES.values() if mode not in ends] == []
    assert all(way.kept not in ends for way in NOT_TAKEN.values())


def test_outliers_leave_the_function():
    """In float64, so that nothing but the injection could change it."""
    denoiser = build(TINY, torch.device("cpu"), torch.float32).double().eval()
    changed = copy.deepcopy(denoiser)
    assert inject_outliers(changed) == sum(4 + 3 for name, _ in denoiser.named_modules() if name.endswith("ff")) + sum(
        1 for name, _ in denoiser.named_modules() if name.endswith("ff")
    )
    call = {**TINY.inputs(1, torch.device("cpu"), torch.float64, 1)}
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    added = {name.partition(".")[2]: value for name, value in call.items() if "." in name}
    arguments = {"encoder_hidden_states": call["encoder_hidden_states"], "added_cond_kwargs": added}
    with torch.no_grad():
        plain, other = (model(x, torch.ones(1), **arguments)[0] for model in (denoiser, changed))
    assert (plain - other).abs().max() < 1e-9 * plain.abs().max()
    largest = max(module.weight.abs().max() for name, module in changed.named_modules() if name.endswith("norm1"))
    assert largest > 50


def test_a_whole_distillation():
    """Of a tiny pipeline: from the first state to the last picture."""
    tiny = FAMILIES["sdxl"]
    wanted = row("blocks", model="sdxl-1024", device="cpu", base="int8", whole=True)
    settings = {"adapter": agd.AdapterConfig(hidden=2), "call": {"height": 16, "width": 16}}
    found = whole.whole_row(wanted, tiny.pipeline(), **settings)
    assert found["note"] is None and found["loss"] > 0 and found["parameters"] > 0 and found["whole"]
    assert set(found["phases"]["seconds"]) == {"collect", "train", "validate"} and found["phases"]["streamed"] is False
    assert set(found) == {*KEY, *memory_rows.FIGURES} and key(found) != key(
        row("blocks", model="sdxl-1024", device="cpu", base="int8")
    )


def test_a_whole_distillation_that_runs_out_of_memory_is_a_note(monkeypatch):
    def distill(*_, **settings):
        assert settings["memory"] is None and settings["base_weights"] is None
        raise torch.OutOfMemoryError("collecting states ran out of memory")

    monkeypatch.setattr(agd, "distill", distill)
    assert (
        whole.whole_row(row("eager", device="cpu", whole=True), object())["note"]
        == "out of memory: collecting states ran out of memory"
    )


def test_the_pipeline_of_sdxl_is_as_published():
    """But for the denoiser, which is small here. Parameters of both text encoders and the VAE: of their weights on the Hub."""
    with init_empty_weights():
        pipe = whole.sdxl(
            replace(ARCHITECTURES["sdxl-1024"], cls=SMALL.cls, config=SMALL.config), torch.device("meta"), torch.bfloat16
        )
    names = ("text_encoder", "text_encoder_2", "vae")
    sizes = [sum(p.numel() for p in getattr(pipe, name).parameters()) for name in names]
    assert sizes == [123_060_480, 694_659_840, 83_653_863]
    assert len(pipe.tokenizer("a red cat", padding="max_length").input_ids) == 77
