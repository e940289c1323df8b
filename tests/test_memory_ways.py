"""The way of a run in little memory: asked for or chosen, the next one when memory runs out, and where it is written."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.cli import app
from agd_fast.distillation import job
from agd_fast.distillation.student import Student
from agd_fast.files import read_json
from agd_fast.memory import MODES
from agd_fast.memory.blocks import checkpointing
from agd_fast.memory.choose import USABLE, Way, choose, ways_of
from agd_fast.memory.estimate import MemoryRow
from helpers_distillation import (
    assert_same_tensors,
    collect_tiny,
    contents,
    custom_teacher,
    distill_tiny,
    logged,
    short,
    tiny_teacher,
)
from helpers_memory import wide_teacher


@pytest.mark.parametrize("memory", [*MODES, "blocks"])
def test_what_was_used_is_written_down(tmp_path, memory):
    result = distill_tiny(tmp_path, wide_teacher(), memory=memory, base_weights="int8")
    written = read_json(tmp_path / "distill.json")["memory"]
    assert written == result.memory
    blocks = memory == "blocks"
    way = f"{'blocks run again, activations 8bit' if blocks else f'activations {memory}'}, base in int8"
    assert written == {
        "memory": memory,
        "way": way,
        "activations": "8bit" if blocks else memory,
        "base_weights": "int8",
        "micro_batch_size": None,
        "blocks": blocks,
        "reason": "as asked for",
        "streamed": False,
    }
    assert read_json(tmp_path / "adapter_config.json")["about"]["memory"] == way
    from agd_fast.reporting.card import model_card

    assert way in model_card([tmp_path], "me/adapter")
    assert distill_tiny(tmp_path / "plain").memory is None
    assert "memory" not in read_json(tmp_path / "plain" / "distill.json")


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ({"memory": "4bit"}, {"memory": "blocks"}, True),
        ({}, {"memory": "blocks", "base_weights": "int8"}, True),
        ({"memory": "8bit", "base_weights": "int8"}, {}, True),
        ({"memory": "4bit"}, {"memory": "4bit", "train_config": short(micro_batch_size=2)}, False),
    ],
)
def test_a_run_that_ran_out_of_memory_goes_on_in_another_way_and_says_so(tmp_path, monkeypatch, first, then, told):
    """From its checkpoint, over the same states. Those of a tiny model are too small to be packed: over the base as it is, the
    adapter is that of one way all along, bit for bit."""
    full = Full(monkeypatch, 8)
    with pytest.raises(torch.OutOfMemoryError, match="with which the same output_dir goes on"):
        distill_tiny(tmp_path / "run", **first)
    full.failing = ()
    states = contents(tmp_path / "run" / "trajectories")
    found = distill_tiny(tmp_path / "run", **then)
    assert full.count == 8 + (12 - 5) * (4 if "train_config" in then else 1)
    assert contents(tmp_path / "run" / "trajectories") == states
    notes = [entry for entry in logged(tmp_path / "run") if "memory" in entry]
    assert [entry["step"] for entry in notes] == [5] * told
    if told:
        way = found.memory["way"] if found.memory else "nothing saved"
        assert notes[0]["memory"].startswith(f"{way}, after ") and notes[0]["memory"].endswith("until step 5")
    if found.memory:
        assert ("until step 5" in found.memory["reason"]) == told
    if then == {"memory": "blocks"}:
        assert_same_tensors(found.adapter.state_dict(), distill_tiny(tmp_path / "whole", **then).adapter.state_dict())


def test_a_run_that_is_done_keeps_the_way_that_it_was_done_in(tmp_path):
    first = distill_tiny(tmp_path, memory="4bit")
    again = distill_tiny(tmp_path, memory="8bit")
    assert_same_tensors(again.adapter.state_dict(), first.adapter.state_dict())
    assert again.memory["reason"] == "activations 8bit, after activations 4bit until step 12"
    assert not [entry for entry in logged(tmp_path) if "memory" in entry]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory": "2bit"}, "memory .*'exact', '8bit', '4bit', 'recompute', 'blocks', 'auto'.*'2bit'"),
        ({"base_weights": "int4"}, "base_weights .*'int8', 'nf4'.*'int4'"),
    ],
)
def test_an_unknown_name_is_said_before_anything_runs(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_blocks_give_the_adapter_of_8_bits_and_leave_the_model_as_it_was(tmp_path, monkeypatch):
    """The blocks of a tiny model run again in every backward, and are what they were."""
    states = collect_tiny(tmp_path / "states", wide_teacher(), trajectories=6)
    found, reruns = {}, []
    for memory in ("8bit", "blocks"):
        teacher = wide_teacher()
        block = teacher.denoiser.transformer_blocks[0]

        def forward(*args, own=block.forward, **kwargs):
            reruns.append(torch.is_grad_enabled())
            return own(*args, **kwargs)

        monkeypatch.setattr(block, "forward", forward)
        found[memory] = distill_tiny(tmp_path / memory, teacher, trajectories=states, memory=memory)
        assert not teacher.denoiser.is_gradient_checkpointing
        found[memory, "runs"] = sum(reruns)
        reruns.clear()
    assert_same_tensors(found["blocks"].adapter.state_dict(), found["8bit"].adapter.state_dict())
    assert found["blocks", "runs"] == 2 * found["8bit", "runs"] > 0


def test_checkpointing_that_was_there_before_is_there_again():
    first, second = wide_teacher().denoiser, wide_teacher().denoiser
    first.enable_gradient_checkpointing(own := partial(checkpoint, use_reentrant=False))
    second.enable_gradient_checkpointing()
    second.gradient_checkpointing = False
    kinds = [[(module, dict(vars(module))) for module in model.modules()] for model in (first, second)]
    for model, before in zip((first, second), kinds, strict=True):
        with checkpointing(model):
            assert all(module.gradient_checkpointing for module, values in before if "gradient_checkpointing" in values)
        assert all(vars(module) == values for module, values in before)
    assert first._gradient_checkpointing_func is own and not second.gradient_checkpointing


@pytest.mark.parametrize("training", [False, True])
def test_random_numbers_are_the_same_again_where_any_are_drawn(training, monkeypatch):
    model, looked, own = wide_teacher().denoiser.train(training), [], torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: looked.append(1) or own())
    x = torch.randn(2, 1, 8, 8, requires_grad=True)
    with checkpointing(model):
        model(x, timestep=torch.tensor([1, 2]), class_labels=torch.tensor([0, 1])).sample.sum().backward()
    assert bool(looked) == training


def test_blocks_of_a_model_that_has_none_are_refused_before_anything_runs(tmp_path):
    teacher = custom_teacher()
    with pytest.raises(ValueError, match="memory='blocks' expects a model of diffusers with gradient checkpointing, found none"):
        agd.distill(teacher, conditions={"label": torch.arange(3)}, output_dir=tmp_path / "run", memory="blocks")
    assert not (tmp_path / "run").exists() and attachment_of(teacher) is None
    assert [way.mode for way in ways_of("auto", None, None, blocks=False)] == [*MODES, "recompute"]


def test_auto_on_the_cpu_is_exact(tmp_path):
    states = collect_tiny(tmp_path / "states", wide_teacher(), trajectories=6)
    results = {
        name: distill_tiny(tmp_path / name, wide_teacher(), trajectories=states, memory=name) for name in ("auto", "exact")
    }
    assert contents(tmp_path / "auto")["checkpoint.safetensors"] == contents(tmp_path / "exact")["checkpoint.safetensors"]
    assert_same_tensors(results["auto"].adapter.state_dict(), results["exact"].adapter.state_dict())
    assert results["auto"].memory["reason"] == "activations exact, for there is no card to fit"


class Full:
    """Raises where a device is full, in some of the student's forwards."""

    def __init__(self, monkeypatch, *failing):
        self.count, self.failing = 0, failing
        forward = Student.forward

        def counted(student, batch):
            self.count += 1
            if self.count in self.failing:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(student, batch)

        monkeypatch.setattr(Student, "forward", counted)


@pytest.mark.parametrize("base_weights", [None, "int8"])
def test_auto_takes_the_next_way_once_and_goes_on_without_harm(tmp_path, monkeypatch, base_weights):
    """The states of a tiny model are too small to be packed, so that every mode gives the same adapter bit for bit, if a failed
    step leaves nothing behind: in its second micro-batch a gradient is there already."""
    config = short(micro_batch_size=4, ema=0.9)
    whole = distill_tiny(tmp_path / "whole", memory="auto", base_weights=base_weights, train_config=config)
    full = Full(monkeypatch, 10)  # step 5
    with pytest.warns(UserWarning, match="activations exact.* ran out of memory at step 5; going on with activations 8bit"):
        found = distill_tiny(tmp_path / "run", memory="auto", base_weights=base_weights, train_config=config)
    assert full.count == 12 * 2 + 2
    assert_same_tensors(found.adapter.state_dict(), whole.adapter.state_dict())
    assert [e["loss"] for e in logged(tmp_path / "run")] == [e["loss"] for e in logged(tmp_path / "whole")]
    assert found.memory["activations"] == "8bit" and "after activations exact" in found.memory["reason"]
    assert "ran out of memory at step 5" in read_json(tmp_path / "run" / "distill.json")["memory"]["reason"]


@pytest.mark.filterwarnings("ignore:.*ran out of memory")
@pytest.mark.parametrize(
    ("memory", "failing", "step"), [("auto", (10, 12), 11), ("auto", (3, 4), 3), ("4bit", (2,), 2), (None, (1,), 1)]
)
def test_without_another_way_the_error_names_what_may_help(tmp_path, monkeypatch, memory, failing, step):
    teacher = tiny_teacher()
    base = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    Full(monkeypatch, *failing)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        distill_tiny(tmp_path, teacher, memory=memory, base_weights="int8")
    message = str(caught.value)
    for part in (
        f"at step {step} with",
        "Tried to allocate 2.00 GiB",
        *map(repr, [*MODES, "blocks"]),
        "base_weights='int8'",
        "micro_batch_size",
    ):
        assert part in message
    assert attachment_of(teacher) is None
    assert_same_tensors(teacher.denoiser.state_dict(), base)
    assert "forward" not in vars(teacher.denoiser)
    assert all(p.grad is None for p in teacher.denoiser.parameters())


SIZES = {"exact": 100, "8bit": 60, "4bit": 40, "recompute": 20, "blocks": 15}


def row(way):
    """Weights and the like take 50, in int8 25; activations by mode; a fifth of them again for a moment."""
    activations = SIZES[way.mode]
    return MemoryRow(way.mode, 25 if way.base_weights else 50, 0, 0, 0, activations, activations // 5, {})


@pytest.mark.parametrize(
    ("budget", "batch", "way"),
    [
        (50 + 120, 4, Way("exact", None, 1)),
        (50 + 240, 4, Way("exact", None, 2)),
        (50 + 239, 4, Way("exact", None, 1)),
        (50 + 5000, 4, Way("exact", None, 4)),
        (50 + 360, 8, Way("exact", None, 2)),  # of three, which leave a rest
        (50 + 360, 7, Way("exact", None, 3)),  # since one by one were twice as many forwards
        (50 + 119, 4, Way("8bit", None, 1)),
        (50 + 71, 4, Way("4bit", None, 1)),
        (50 + 47, 1, Way("recompute", None, 1)),
        (50 + 18, 1, Way("8bit", None, 1, blocks=True)),
        (25 + 48, 4, Way("8bit", None, 1, blocks=True)),
        (25 + 24, 4, Way("recompute", "int8", 1)),
        (25 + 18, 4, Way("8bit", "int8", 1, blocks=True)),
        (25 + 17, 4, Way("8bit", "int8", 1, blocks=True)),
    ],
)
def test_auto_takes_the_first_mode_that_fits_and_as_many_states_as_fit(budget, batch, way):
    choice = choose(ways_of("auto", None, None), -(-budget * 1000 // int(USABLE * 1000)), batch, row)
    assert choice.ways[0] == way
    order = [*((mode, None) for mode in SIZES), ("recompute", "int8"), ("blocks", "int8")]
    kept = [(one.mode, one.base_weights) for one in choice.ways]
    following = order[order.index(kept[0]) + 1 :][:1]
    assert kept == [kept[0], *following]
    assert str(way) in choice.reason


def test_what_auto_goes_on_with_takes_clearly_less():
    """Blocks take as little as what is made again by itself: then the base's weights are what is left to save."""

    def level(way):
        found = row(way)
        return replace(found, activations=19) if way.blocks else found

    choice = choose(ways_of("auto", None, None), -(-74 * 1000 // int(USABLE * 1000)), 1, level)
    assert choice.ways == (Way("recompute", None, 1), Way("recompute", "int8", 1))


def test_auto_says_why(monkeypatch):
    import agd_fast.memory.choose as room

    monkeypatch.setattr(room, "_GIB", 1)
    choice = choose(ways_of("auto", None, None), 150, 8, row)
    assert choice.reason == "activations 8bit, 1 state a forward: 122.00 of 150.00 GiB; activations exact would take 170.00"
    least = choose(ways_of("auto", "nf4", None), 40, 8, row)
    assert least.ways == (Way("8bit", "nf4", 1, blocks=True),)
    assert least.reason.startswith(
        "blocks run again, activations 8bit, base in nf4, 1 state a forward, the last way there is, though"
    )


def test_auto_keeps_to_what_was_asked_for():
    choice = choose(ways_of("auto", "int8", 3), 400, 8, row)
    assert choice.ways[0] == Way("8bit", "int8", 3)
    assert {(left.base_weights, left.micro_batch_size) for left in choice.ways} == {("int8", 3)}
    assert choose(ways_of("auto", None, 99), 10**6, 8, row).ways[0] == Way("exact", None, 99)


def test_auto_on_a_card_estimates_the_largest_states(tmp_path, monkeypatch):
    """The estimate is of the real denoiser with its adapter and of a state of the trajectories."""
    teacher, seen = wide_teacher(), []
    weights = sum(value.nbytes for value in teacher.denoiser.state_dict().values())

    def budget(device, resident):
        seen.append(resident)
        return 10 * weights

    monkeypatch.setattr(job, "budget_on", budget)
    monkeypatch.setattr(job.Residency, "of", classmethod(lambda cls, teacher, *_: cls(teacher, torch.device("cpu"))))
    choice_of = job._choice
    monkeypatch.setattr(job, "_choice", lambda j, states, _, is_short: choice_of(j, states, torch.device("cuda"), is_short))
    result = distill_tiny(tmp_path, teacher, memory="auto")
    assert seen == [0]  # nothing of it is on a card
    assert result.memory["activations"] == "exact" and 1 <= result.memory["micro_batch_size"] <= 8


def test_the_command_line_saves_memory(tmp_path):
    arguments = [
        "distill",
        "--output",
        tmp_path,
        "--steps",
        2,
        "--batch-size",
        4,
        "--trajectories",
        2,
        "--validation",
        0,
        "--quiet",
    ]
    arguments += ["--memory", "auto", "--base-weights", "int8", "--micro-batch-size", 3]
    done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "distill.json").read_text())["memory"] | {"reason": ""} == {
        "memory": "auto",
        "way": "activations exact, base in int8, 3 states a forward",
        "activations": "exact",
        "base_weights": "int8",
        "micro_batch_size": 3,
        "blocks": False,
        "reason": "",
        "streamed": False,
    }
