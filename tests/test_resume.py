"""A run that was killed goes on to what it would have been."""

import json
import shutil
from functools import partial

import pytest
import torch

from agd_fast.attaching import attachment_of
from agd_fast.files import read_json, read_tensors, write_json, write_tensors
from helpers_distillation import (
    after_calls,
    assert_same_tensors,
    contents,
    distill_tiny,
    kill_in_child,
    kill_self,
    short,
    small,
    tiny_teacher,
)

SETTINGS = {
    "default": {},
    "ema": {"train_config": short(ema=0.9)},
    "cross_attention": {
        "adapter": small(kind="cross_attention"),
        "train_config": short(loss="l1", weighting="uniform"),
    },
    "bf16": {"train_config": short(mixed_precision="bf16", weight_decay=0.1)},
}


def killed_while_training(directory, name):
    """SIGKILL in the eighth training step: the checkpoint holds five."""
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 8, kill_self, training=True)
    distill_tiny(directory, teacher, **SETTINGS[name])


def killed_in_a_checkpoint(directory):
    """SIGKILL when half of the second checkpoint, that of step ten, is on disk."""
    import agd_fast.files

    whole, checkpoints = agd_fast.files.save_file, []

    def save_half(tensors, path, metadata):
        whole(tensors, path, metadata)
        checkpoints.extend([path] * path.name.startswith(".checkpoint"))
        if len(checkpoints) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            kill_self()

    agd_fast.files.save_file = save_half
    distill_tiny(directory)


def killed_on_policy(directory, init, call, training):
    """SIGKILL in a forward call of the teacher, or in a training step."""
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, call, kill_self, training=training)
    distill_tiny(directory, teacher, init=init, source="student")


def killed_while_collecting(directory):
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 5, kill_self)
    distill_tiny(directory, teacher)


def entries(directory):
    """The log without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "samples_per_second"} for line in lines]


def assert_same_run(found, expected):
    for name in ("adapter.safetensors", "checkpoint.safetensors"):
        tensors, metadata = read_tensors(found / name)
        wanted, wanted_metadata = read_tensors(expected / name)
        assert_same_tensors(tensors, wanted)
        assert metadata == wanted_metadata
    files, others = contents(found), contents(expected)
    assert files.keys() == others.keys()
    changing = {"log.jsonl", "distill.json"}
    assert [name for name in files if name not in changing and files[name] != others[name]] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs by name."""
    folder = tmp_path_factory.mktemp("whole")
    for name, settings in SETTINGS.items():
        distill_tiny(folder / name, **settings)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_distill_continues_after_a_kill_while_training(tmp_path, whole, name):
    kill_in_child(killed_while_training, tmp_path, name)
    assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "5"
    assert not (tmp_path / "adapter.safetensors").exists()
    teacher, steps = tiny_teacher(), []
    teacher.denoiser.register_forward_hook(lambda *_: steps.append(1) if torch.is_grad_enabled() else None)
    result = distill_tiny(tmp_path, teacher, **SETTINGS[name])
    assert len(steps) == 7
    assert_same_run(tmp_path, whole / name)
    assert_same_tensors(result.adapter.state_dict(), read_tensors(whole / name / "adapter.safetensors")[0])


def test_distill_continues_after_a_kill_in_a_checkpoint(tmp_path, whole):
    kill_in_child(killed_in_a_checkpoint, tmp_path)
    assert (tmp_path / ".checkpoint.safetensors.partial").stat().st_size == 1000
    assert read_tensors(tmp_path / "checkpoint.safetensors")[1]["step"] == "5"
    distill_tiny(tmp_path)
    assert_same_run(tmp_path, whole / "default")


def test_distill_continues_after_a_kill_while_collecting(tmp_path, whole):
    kill_in_child(killed_while_collecting, tmp_path)
    assert not (tmp_path / "checkpoint.safetensors").exists()
    distill_tiny(tmp_path)
    assert_same_run(tmp_path, whole / "default")


@pytest.fixture(scope="module")
def on_policy(tmp_path_factory, whole):
    """An uninterrupted run on the states of the default run's adapter."""
    directory = tmp_path_factory.mktemp("on_policy")
    distill_tiny(directory, init=whole / "default", source="student")
    return directory


@pytest.mark.parametrize(("call", "training"), [(10, False), (8, True)])  # in the second of three shards; in the eighth step
def test_distill_on_policy_continues_after_a_kill(tmp_path, whole, on_policy, call, training):
    init = whole / "default"
    kill_in_child(killed_on_policy, tmp_path, init, call, training)
    files = read_json(tmp_path / "trajectories" / "manifest.json")["files"]
    assert ("shard-00000.safetensors" in files, "shard-00001.safetensors" in files) == (True, training)
    distill_tiny(tmp_path, init=init, source="student")
    assert_same_run(tmp_path, on_policy)


def test_distill_on_policy_remakes_a_shard_with_the_adapter_it_began_with(tmp_path, whole, on_policy):
    """Not with the half-trained one of the checkpoint."""
    init = whole / "default"
    interrupt(tmp_path, 8, init=init, source="student")
    manifest = tmp_path / "trajectories" / "manifest.json"
    content = read_json(manifest)
    del content["files"]["shard-00002.safetensors"]
    write_json(manifest, content)
    (tmp_path / "trajectories" / "shard-00002.safetensors").unlink()
    distill_tiny(tmp_path, init=init, source="student")
    manifest.write_bytes((on_policy / "trajectories" / "manifest.json").read_bytes())  # its entries are in another order
    assert_same_run(tmp_path, on_policy)


@pytest.mark.parametrize(("source", "message"), [("trajectories", "init: expected '.*', found '"), ("student", "adapter.hash")])
def test_distill_refuses_to_continue_from_another_adapter(tmp_path, whole, source, message):
    distill_tiny(tmp_path / "other", train_config=short(seed=1))
    interrupt(tmp_path / "run", 8, init=whole / "default", source=source)
    with pytest.raises(ValueError, match=message):
        distill_tiny(tmp_path / "run", init=tmp_path / "other", source=source)
    if source == "trajectories":
        with pytest.raises(ValueError, match="init: expected None, found '"):
            distill_tiny(tmp_path / "run")


def test_distill_continues_in_the_middle_of_an_epoch_and_of_a_log_entry(tmp_path):
    config = short(steps=9, batch_size=5, checkpoint_every=4, log_every=3)
    distill_tiny(tmp_path / "whole", train_config=config)
    interrupt(tmp_path / "cut", 6, train_config=config)
    distill_tiny(tmp_path / "cut", train_config=config)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_distill_continues_the_log_after_the_steps_it_keeps(tmp_path):
    config = short(checkpoint_every=6)
    distill_tiny(tmp_path / "whole", train_config=config)
    interrupt(tmp_path / "cut", 10, train_config=config)
    with open(tmp_path / "cut" / "log.jsonl", "ab") as file:
        file.write(b'null\n{"step": "x"}\n\xff\n{"step": 12, "lo')  # a line cut short, after what is none
    result = distill_tiny(tmp_path / "cut", train_config=config)
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")
    assert result.loss == entries(tmp_path / "whole")[-1]["loss"]


def test_distill_continues_with_other_intervals(tmp_path, whole):
    """Also a log entry that had begun."""
    interrupt(tmp_path, 8)
    result = distill_tiny(tmp_path, train_config=short(checkpoint_every=7, log_every=2))
    assert_same_tensors(result.adapter.state_dict(), read_tensors(whole / "default" / "adapter.safetensors")[0])
    found, expected = ({entry["step"]: entry["loss"] for entry in entries(folder)} for folder in (tmp_path, whole / "default"))
    assert list(found) == [3, 6, 8, 10, 12]
    assert (found[3], found[6]) == (expected[3], expected[6])


@pytest.mark.parametrize("cut", [1, 2])  # in the middle, after the last step
def test_distill_makes_up_for_a_validation_that_was_cut_short(tmp_path, monkeypatch, cut):
    import agd_fast.distillation.job as job

    settings = {"train_config": short(checkpoint_every=6, ema=0.9), "validation": 1, "validate_every": 6}
    settings |= {"guidance_range": (2.5, 3.5)}  # of one scale
    distill_tiny(tmp_path / "whole", **settings)
    measure, calls = job.guidance_explained, []

    def stop(*args, **kwargs):
        calls.append(args)
        if len(calls) == cut:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(job, "guidance_explained", stop)
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(tmp_path / "cut", **settings)
    distill_tiny(tmp_path / "cut", **settings)
    assert len(calls) == 4  # steps 6 and 12, one of them twice, and the end
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")


def test_distill_continues_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = short(checkpoint_every=6)
    interrupt(tmp_path, 8, train_config=config, tensorboard=True)
    distill_tiny(tmp_path, train_config=config, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("distill/loss")
    expected = [(entry["step"], pytest.approx(entry["loss"])) for entry in entries(tmp_path)]
    assert [(event.step, event.value) for event in events] == expected


def interrupt(directory, step, **settings):
    """Ctrl-C in a training step."""

    def stop():
        raise KeyboardInterrupt

    teacher = tiny_teacher()
    after_calls(teacher.denoiser, step, stop, training=True)
    with pytest.raises(KeyboardInterrupt):
        distill_tiny(directory, teacher, **settings)
    assert attachment_of(teacher) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_config": short(learning_rate=0.5, seed=3)},
            r"train.learning_rate: expected 0.5, found 0.02; train.seed",
        ),
        ({"train_config": short(ema=0.5)}, "train.ema: expected 0.5, found None"),
        ({"adapter": small(hidden=5)}, "adapter.hidden: expected 5, found 4"),
        ({"adapter": small(kind="offset")}, "adapter.kind: expected 'offset', found 'modulation'"),
    ],
)
def test_distill_refuses_to_continue_with_other_settings(tmp_path, settings, message):
    interrupt(tmp_path, 8)
    before, teacher = contents(tmp_path), tiny_teacher()
    with pytest.raises(ValueError, match=f"{tmp_path}/checkpoint.safetensors belongs .*{message}") as error:
        distill_tiny(tmp_path, teacher, **settings)
    assert "batch_size" not in str(error.value)
    assert contents(tmp_path) == before
    assert attachment_of(teacher) is None


def test_distill_names_a_checkpoint_of_another_version(tmp_path):
    interrupt(tmp_path, 8)
    path = tmp_path / "checkpoint.safetensors"
    tensors, metadata = read_tensors(path)
    run = json.loads(metadata["run"])
    run["train"]["log_every"] = 20  # which runs did not go without
    kept = {name: value for name, value in metadata.items() if name != "meter"}
    write_tensors(path, {name: value.clone() for name, value in tensors.items()}, kept | {"run": json.dumps(run)}, sealed=True)
    with pytest.raises(ValueError, match="is of another version: expected the state of meter too; resume=False starts anew"):
        distill_tiny(tmp_path)


def test_distill_refuses_a_foreign_checkpoint(tmp_path, whole):
    interrupt(tmp_path, 8)
    (tmp_path / "adapter.safetensors").write_bytes((whole / "default" / "adapter.safetensors").read_bytes())
    (tmp_path / "adapter.safetensors").rename(tmp_path / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="belongs to a run with other settings"):
        distill_tiny(tmp_path)


def flipped(part, content):
    """With another bit in the first letter of where `part` is last."""
    place = content.rindex(part)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        partial(flipped, b"way"),  # in the metadata
        partial(flipped, b"U8"),  # in what is said of a tensor
        lambda content: flipped(content[-1:], content),
    ],
)
def test_distill_refuses_a_damaged_checkpoint(tmp_path, whole, damage):
    path = shutil.copytree(whole / "default", tmp_path / "run") / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    advice = "remove it, or give resume=False, to start anew"
    with pytest.raises(ValueError, match=f"{path} is (damaged|truncated or not a).*; {advice}"):
        distill_tiny(path.parent)


def test_distill_of_a_finished_run_leaves_damaged_entries_of_its_log_and_needs_none(tmp_path, whole):
    log = shutil.copytree(whole / "default", tmp_path / "run") / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'\xff\xfe\x00\n{"step": "a"}\nnull\n[1]\n')
    distill_tiny(log.parent)
    assert [entry["step"] for entry in entries(log.parent)] == [3, 6, 9, 12]
    log.unlink()
    distill_tiny(log.parent)
    assert json.loads((log.parent / "distill.json").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_distill_anew_forgets_what_was_measured_on_the_way(tmp_path):
    (tmp_path / "validation").mkdir()
    for name in ("mine.txt", "step-000006.json", "step-000006.png"):
        (tmp_path / "validation" / name).touch()
    distill_tiny(tmp_path, train_config=short(steps=1), trajectories=2)
    assert len(list((tmp_path / "validation").iterdir())) == 3
    distill_tiny(tmp_path, train_config=short(steps=1), trajectories=2, resume=False)
    assert [path.name for path in (tmp_path / "validation").iterdir()] == ["mine.txt"]


def test_distill_anew_forgets_the_run_before(tmp_path):
    distill_tiny(tmp_path / "first", train_config=short(learning_rate=0.5))
    distill_tiny(tmp_path / "whole")
    result = distill_tiny(tmp_path / "first", resume=False)
    assert_same_run(tmp_path / "first", tmp_path / "whole")
    assert entries(tmp_path / "first") == entries(tmp_path / "whole")
    assert result.loss == read_json(tmp_path / "first" / "distill.json")["loss"]


def test_distill_anew_killed_before_its_first_checkpoint_does_not_fall_back(tmp_path):
    distill_tiny(tmp_path)
    interrupt(tmp_path, 2, resume=False)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", ["default", "ema"])
def test_distill_again_returns_at_once_with_the_same_adapter(tmp_path, name):
    first = distill_tiny(tmp_path, **SETTINGS[name])
    before = contents(tmp_path)
    teacher = tiny_teacher()
    after_calls(teacher.denoiser, 1, partial(pytest.fail, "it was trained again"), training=True)
    after_calls(teacher.denoiser, 1, partial(pytest.fail, "it collected again"))
    again = distill_tiny(tmp_path, teacher, **SETTINGS[name])
    assert_same_tensors(again.adapter.state_dict(), first.adapter.state_dict())
    assert again.loss == first.loss
    after = contents(tmp_path)
    assert [path for path in before if path != "distill.json" and before[path] != after[path]] == []
