"""DDP and FSDP2 around a denoiser with an adapter, in two processes."""

import os
import socket

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import agd_fast as agd
from agd_fast.attaching import require_attachment
from conftest import assert_as_exact
from helpers_distillation import in_children
from helpers_pipelines import SCALE, attach, model


class Guided(nn.Module):
    """A denoiser with its adapter as one module, as `distill` trains them: what wraps it wraps both."""

    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.adapter = denoiser, require_attachment(denoiser).adapter

    def forward(self, omega, **inputs):
        with agd.guided(self.denoiser, omega):
            return self.denoiser(**inputs, return_dict=False)[0].square().mean()


def gradients(this, rank=None, wrap=lambda denoiser: denoiser, first="adapter", ddp=False, whole=False):
    """Of the adapter over two samples, one after the other, or as one batch (whole); of a rank, of its sample and the other's."""
    scales = torch.tensor([2.0, 5.0])
    parts = [slice(None)] if whole else [slice(row, row + 1) for row in ((0, 1) if rank is None else (rank,))]
    if this.attachment is None and first == "other":
        wrap(this.denoiser, embedder=False)
    if this.attachment is None:
        attach(this.denoiser)
    if first == "adapter":
        wrap(this.denoiser)
    this.denoiser.requires_grad_(False)
    module = Guided(this.denoiser)
    if ddp:
        module = DistributedDataParallel(module)
    for rows in parts:
        loss = module(scales[rows], **{name: value[rows] for name, value in this.inputs.items()})
        (loss / len(parts)).backward()
    adapter = this.attachment.adapter
    if rank is not None and not ddp:
        for parameter in adapter.parameters():
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    return {name: parameter.grad.numpy() for name, parameter in adapter.named_parameters()}


def shard(denoiser, embedder=True):
    """Each block, and what is left, as one of FSDP2's groups; DiT itself reaches into its first block.

    embedder: of t, as a group of its own: one of those does not run before the denoiser itself has.
    """
    blocks = [*getattr(denoiser, "down_blocks", []), *getattr(denoiser, "up_blocks", [])]
    for block in blocks or [*denoiser.transformer_blocks][1:]:
        fully_shard(block)
    if embedder and hasattr(denoiser, "time_embedding"):
        fully_shard(denoiser.time_embedding)
    fully_shard(denoiser)


def one_of_two(rank, port, name, way, first):
    names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in names.items()})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    try:
        this = model(name)
        if way == "ddp":
            return gradients(this, rank, ddp=True), type(this.denoiser).__name__
        found = gradients(this, rank, shard, first), type(this.denoiser).__name__
        agd.unload(this.denoiser)
        assert all("_agd" not in vars(module) for module in this.denoiser.modules())
        attach(this.denoiser)  # and again
        with torch.no_grad():
            this(SCALE)
        return found
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "way", "first"),
    [("unet", "ddp", "adapter"), ("unet", "fsdp2", "adapter"), ("unet", "fsdp2", "other"), ("dit", "fsdp2", "other")],
)
def test_gradients_of_two_processes_are_those_of_one(name, way, first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (found, cls), (other, _) = in_children(one_of_two, 2, port, name, way, first)
    assert ("FSDP" in cls) == (way == "fsdp2")
    this = model(name)
    attach(this.denoiser)
    reference = gradients(this.exact(), whole=True)
    for key, plain in gradients(this).items():
        assert (found[key] == other[key]).all()
        assert_as_exact(torch.from_numpy(found[key]), torch.from_numpy(plain), torch.from_numpy(reference[key]))
