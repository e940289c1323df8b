"""What a training run says of itself, when it looks at the device for that, and where it stops."""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from agd_fast.attaching import attachment_of
from agd_fast.distillation.log import Meter
from agd_fast.files import read_tensors
from agd_fast.trajectories import Trajectories
from helpers_distillation import (
    assert_same_tensors,
    contents,
    distill_tiny,
    logged,
    short,
    tiny_teacher,
)


class Spoiled(Trajectories):
    """Trajectories whose target is `value` in one batch."""

    def __init__(self, directory, step, value):
        super().__init__(directory)
        self.left, self.value = step, value

    def batches(self, rows):
        batches = super().batches(rows)
        self.left -= 1
        if self.left == 0:
            batches[0].target[0, 0, 0, 0] = self.value
        return batches


def test_distill_logs_every_few_steps_and_the_last(tmp_path):
    config = short(steps=10, log_every=3, warmup=0.2, learning_rate=0.5)
    distill_tiny(tmp_path, train_config=config)
    entries = logged(tmp_path)
    assert [entry["step"] for entry in entries] == [3, 6, 9, 10]
    for entry in entries:
        assert set(entry) == {"step", "loss", "grad_norm", "learning_rate", "samples_per_second"}
        share = (entry["step"] - 1 - 2) / 8  # of the cosine, after two steps of warm-up, before this step
        assert entry["learning_rate"] == pytest.approx(0.5 * 0.5 * (1 + math.cos(math.pi * share)))
        assert entry["samples_per_second"] > 0
        assert entry["grad_norm"] > 0


def test_distill_logs_the_mean_since_the_last_entry(tmp_path):
    for log_every in (1, 4):
        distill_tiny(tmp_path / str(log_every), train_config=short(steps=8, log_every=log_every))
    every, fourth = ([entry["loss"] for entry in logged(tmp_path / name)] for name in ("1", "4"))
    assert fourth == pytest.approx([sum(every[:4]) / 4, sum(every[4:]) / 4])


def test_sums_go_on_in_their_own_process_and_are_timed_from_there(tmp_path, monkeypatch):
    clock = SimpleNamespace(perf_counter=lambda: clock.now, now=0.0)
    monkeypatch.setattr("agd_fast.distillation.log.time", clock)

    def meter_of(rank):
        of_two = {"gather": lambda one: torch.stack([one, 2 * one]), "reduce": lambda one, _: one}
        return Meter(SimpleNamespace(device=torch.device("cpu"), process_index=rank, scaler=None, **of_two), tmp_path / "none")

    before = meter_of(0)
    before.add(torch.tensor(3.0), torch.tensor(1.0), 0)
    before.settle()
    state = json.loads(json.dumps(before.state_dict()))
    before.add(torch.tensor(9.0), torch.tensor(1.0), 1)  # is lost
    for rank, total in enumerate((3.0, 6.0)):
        after = meter_of(rank)
        after.load_state_dict(state)
        after.add(torch.tensor(5.0), torch.tensor(1.0), 1)
        clock.now += 2.0
        entry = after.read(2, 0.1, batch_size=8)
        assert (entry["loss"], entry["samples_per_second"]) == ((total + 5.0) / 2, 8 / 2.0)


def test_distill_writes_tensorboard_on_request(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distill_tiny(tmp_path / "plain")
    assert not (tmp_path / "plain" / "tensorboard").exists()
    distill_tiny(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "grad_norm", "learning_rate", "samples_per_second"):
        found = [(event.step, event.value) for event in events.Scalars(f"distill/{name}")]
        assert found == [(entry["step"], pytest.approx(entry[name])) for entry in logged(tmp_path)]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_distill_reads_nothing_off_the_device_between_logs(tmp_path, monkeypatch, ema):
    """Every way in which Python reads a tensor, by the file that did it; states and AdamW's step lie on the CPU."""
    reads = Counter()
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__len__"):
        monkeypatch.setattr(torch.Tensor, name, counting(getattr(torch.Tensor, name), name, reads))
    distill_tiny(tmp_path / "warm")
    counts = []
    for steps in (20, 40):
        reads.clear()
        config = short(steps=steps, log_every=steps, checkpoint_every=steps, ema=ema)
        distill_tiny(tmp_path / str(steps), train_config=config)
        counts.append(Counter(reads))
    assert counts[0], "nothing was counted at all"
    allowed = {"trajectories/dataset.py", "optim/adamw.py", "optim/adam.py", "optim/optimizer.py"}
    every_step = {where: count - counts[0][where] for where, count in counts[1].items() if count > counts[0][where]}
    assert {where for where, _ in every_step} <= allowed, every_step


def counting(method, name, reads):
    import sys

    def call(self, *args, **kwargs):
        if not (name == "__len__" and self.device.type == "cpu"):
            file = sys._getframe(1).f_code.co_filename
            reads["/".join(Path(file).parts[-2:]), name] += 1
        return method(self, *args, **kwargs)

    return call


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_distill_stops_at_a_loss_that_is_not_finite(tmp_path, value):
    distill_tiny(tmp_path / "first")
    teacher, spoiled = tiny_teacher(), Spoiled(tmp_path / "first" / "trajectories", 8, value)
    base = {name: v.clone() for name, v in teacher.denoiser.state_dict().items()}
    config = short(steps=20, checkpoint_every=5, log_every=20)
    with pytest.raises(FloatingPointError, match=f"at step 8; .*{tmp_path}/run/checkpoint.safetensors"):
        distill_tiny(tmp_path / "run", teacher, trajectories=spoiled, train_config=config)
    tensors, metadata = read_tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert metadata["step"] == "5"
    assert all(torch.isfinite(v).all() for v in tensors.values())
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    assert attachment_of(teacher) is None
    assert all(p.requires_grad for p in teacher.denoiser.parameters())
    assert_same_tensors(teacher.denoiser.state_dict(), base)
    # with the cause gone, the run goes on from there
    sound = Trajectories(tmp_path / "first" / "trajectories")
    distill_tiny(tmp_path / "run", teacher, trajectories=sound, train_config=config)
    distill_tiny(tmp_path / "whole", trajectories=sound, train_config=config)
    assert contents(tmp_path / "run")["adapter.safetensors"] == contents(tmp_path / "whole")["adapter.safetensors"]


def test_distill_stops_before_the_first_checkpoint(tmp_path):
    distill_tiny(tmp_path / "first")
    spoiled = Spoiled(tmp_path / "first" / "trajectories", 1, math.nan)
    with pytest.raises(FloatingPointError, match="at step 1; .*none was written yet"):
        distill_tiny(tmp_path / "run", trajectories=spoiled)
