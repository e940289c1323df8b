"""bench/memory/graph_checks.py where there is no card: no row is green, but for graphs that a host stands in for."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from helpers_graphed import Recording, record_on_host
from memory.graph_checks import SMALL, WAYS, Trained, apart, check, compare, verdict
from memory.rows import CHECKPOINTING
from speed.architectures import ARCHITECTURES, build

DIT = ARCHITECTURES["dit-xl2-256"]
SMALLER = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 8, "num_embeds_ada_norm": 5}
TINY = replace(DIT, config={**DIT.config, **SMALLER}, sample=(4, 8, 8), labels=5)


def test_without_a_card_a_row_says_so_and_is_not_green():
    row = check(CHECKPOINTING, TINY, torch.float32, 2)
    assert row["ok"] is False and row["reason"] == "not all passes ran as graphs: no CUDA device, but cpu"
    assert row["equal"] and row["off"] == row["loss_off"] == 0 and row["passes"]["cuda_graph"] is False
    assert 0 < 2 * row["rounding"] < 0.1 < row["first_batch"]


def keeps_its_first(replay):
    """Nothing that is new is taken in."""

    def replayed(self):
        self.held = getattr(self, "held", None) or [tensor.clone() for tensor in self.tensors]
        for tensor, first in zip(self.tensors, self.held, strict=True):
            tensor.copy_(first)
        replay(self)

    return replayed


def leaves_one_out(replay):
    """A parameter's gradient is not added to, after the replay that is looked at."""

    def replayed(self):
        before = self.parameters[0].grad.clone()
        replay(self)
        if self.runs > 1:
            self.parameters[0].grad.copy_(before)

    return replayed


@pytest.mark.parametrize(("broken", "ok"), [(None, True), (keeps_its_first, False), (leaves_one_out, False)])
def test_graphs_that_are_wrong_are_red(monkeypatch, broken, ok):
    made = record_on_host(monkeypatch)
    if broken:
        monkeypatch.setattr(Recording, "replay", broken(Recording.replay))
    row = compare("8bit", TINY, torch.float32, 6)
    assert len(made) == 4 and row["passes"] == {"cuda_graph": True, "plain_because": ""}
    assert row["ok"] is row["equal"] is ok and (row["off"] > 2 * row["rounding"]) is not ok


def trained(weight, loss, passes=(True, "")):
    return Trained(
        {"weight": torch.tensor([1.0, weight])}, [1.0, loss], dict(zip(("cuda_graph", "plain_because"), passes, strict=True))
    )


PLAIN, START = trained(2.0, 1.0), {"weight": torch.tensor([1.0, 1.0])}


@pytest.mark.parametrize(
    ("graphed", "rounded", "first", "reason"),
    [
        (trained(2.02, 1.02), trained(1.99, 1.01), trained(3.0, 1.0), ""),
        (trained(2.03, 1.0), trained(1.99, 1.01), trained(3.0, 1.0), "further than rounding does"),
        (trained(2.0, 1.03), trained(1.99, 1.01), trained(3.0, 1.0), "further than rounding does"),
        (trained(float("nan"), 1.0), trained(1.99, 1.01), trained(3.0, 1.0), "further than rounding does"),
        (trained(2.0, 1.0), trained(1.4, 1.01), trained(4.0, 1.0), "as far as what is looked for"),
        (trained(2.0, 1.0), trained(1.9, 1.01), trained(2.15, 1.0), "as far as what is looked for"),
        (trained(2.0, 1.0, (True, "more than 4 shapes")), trained(1.99, 1.01), trained(3.0, 1.0), "more than 4 shapes"),
    ],
)
def test_what_is_green(graphed, rounded, first, reason):
    row = verdict(PLAIN, graphed, rounded, first, START)
    assert reason in row["reason"] and row["ok"] is (not reason)


def test_the_tensor_that_is_furthest_apart_counts():
    expected, start = {"a": torch.tensor([2.0]), "b": torch.full((100,), 3.0)}, {"a": torch.zeros(1), "b": torch.zeros(100)}
    assert apart({"a": torch.tensor([2.5]), "b": expected["b"]}, expected, start) == 0.25


def test_an_error_is_red():
    row = check("4bit", replace(TINY, config={"layers": 1}))
    assert row["ok"] is False and "layers" in row["reason"] and row["way"] == "4bit"


def test_what_is_trained_is_an_sdxl_with_every_way():
    denoiser = build(SMALL, torch.device("meta"), torch.bfloat16)
    assert type(denoiser).__name__ == "UNet2DConditionModel" and denoiser.config.addition_embed_type == "text_time"
    assert {*WAYS} == {"eager", "checkpointing", "exact", "8bit", "4bit", "recompute", "blocks", "int8"}
