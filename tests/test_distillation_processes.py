"""agd_fast.distill in two processes."""

import socket

import pytest
import torch

from agd_fast.files import read_tensors
from helpers_distillation import (
    assert_same_tensors,
    distill_tiny,
    in_children,
    logged,
    short,
    tiny_teacher,
)


def one_of_two(rank, directory, port, settings):
    """What a launcher of two processes on the CPU sets up."""
    import os

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()} | {"ACCELERATE_USE_CPU": "true"})
    teacher, batches = tiny_teacher(), []
    teacher.denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: batches.extend([len(kwargs["timestep"])] * torch.is_grad_enabled()), with_kwargs=True
    )
    try:
        saving = {name: settings.pop(name, None) for name in ("memory", "base_weights")}
        result = distill_tiny(directory, teacher, train_config=short(**settings), **saving)
    except (ValueError, FloatingPointError) as error:
        return error
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return result.loss, {name: value.numpy() for name, value in result.adapter.state_dict().items()}, set(batches)


def in_two(directory, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return in_children(one_of_two, 2, directory, port, settings)


@pytest.mark.parametrize(
    ("ema", "micro", "sizes", "saving"),
    [(None, None, {4}, {}), (0.9, 3, {3, 1}, {}), (None, None, {4}, {"memory": "4bit", "base_weights": "int8"})],
)
def test_distill_in_two_processes_is_as_in_one(tmp_path, ema, micro, sizes, saving):
    one = distill_tiny(tmp_path / "one", train_config=short(ema=ema), **saving)
    first, second = in_two(tmp_path / "two", ema=ema, micro_batch_size=micro, **saving)
    assert first[0] == second[0] == pytest.approx(one.loss)
    assert first[2] == second[2] == sizes  # of half of each batch
    for name, value in one.adapter.state_dict().items():
        assert (first[1][name] == second[1][name]).all()
        torch.testing.assert_close(torch.from_numpy(first[1][name]), value)
    saved, _ = read_tensors(tmp_path / "two" / "adapter.safetensors")
    assert_same_tensors(saved, {name: torch.from_numpy(value) for name, value in first[1].items()})
    losses = [[entry["loss"] for entry in logged(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1])
    with pytest.raises(ValueError, match="processes: expected 1, found 2"):
        distill_tiny(tmp_path / "two", train_config=short(ema=ema))


def test_distill_in_two_processes_refuses_a_batch_they_cannot_share(tmp_path):
    for error in in_two(tmp_path, batch_size=7):
        assert "batch_size must be a multiple of the 2 processes, found 7" in str(error)
