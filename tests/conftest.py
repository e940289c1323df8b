"""Tiny models with random weights, states of one, and the one rule of tolerance, for all tests."""

import os

# Kernels run in Triton's interpreter in all tests of this process, which Triton decides when one is decorated; what is compiled
# ahead of time has a process of its own.
os.environ.setdefault("TRITON_INTERPRET", "1")

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.families import find_spec
from helpers_distillation import collect_tiny
from tiny import sd15


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def fresh_dynamo():
    """Nothing that was compiled before, and none of it after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def pipe():
    return sd15.pipeline()


@pytest.fixture
def wrapped(pipe):
    from helpers_pipelines import attach  # which imports this file

    attach(pipe)
    return pipe


@pytest.fixture
def recorded(monkeypatch):
    """The CUDA graphs of passes that are made, where there is no CUDA."""
    from helpers_graphed import record_on_host

    return record_on_host(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def trajectories(folder):
    return collect_tiny(folder)


def make_dit(layers=2, **overrides):
    """With a learned sigma: 2 channels in, 4 out. Labels 0..4, null 5."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": layers,
        "sample_size": 4,
        "patch_size": 2,
    }
    config |= {"in_channels": 2, "out_channels": 4, "num_embeds_ada_norm": 5, "norm_num_groups": 2}
    return DiTTransformer2DModel(**{**config, **overrides}).eval()


def make_unet(**overrides):
    config = {
        "sample_size": 4,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
    }
    config |= {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1}
    config |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 6, "attention_head_dim": 4}
    return UNet2DConditionModel(**{**config, **overrides}).eval()


class TinyAttention(nn.Module):
    """Returns a tuple, attention weights first, as no module of diffusers does."""

    def __init__(self, width):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens):
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return weights, self.out(weights @ v)


class TinyBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.attention = TinyAttention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h, embedding):
        shift, scale, gate = self.modulation(embedding)[:, None].chunk(3, dim=-1)
        _, attended = self.attention(tokens=h * (1 + scale) + shift)
        h = h + gate * attended
        return h + self.mlp(h)


class TinyDenoiser(nn.Module):
    """Not from diffusers. x [B, 3, H, W], t [B], label [B] in 1..4, null 0 → [B, 3, H, W]."""

    def __init__(self, width=12, layers=2):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, width), nn.Linear(width, 3)
        self.label_embedding = nn.Embedding(5, width)
        self.blocks = nn.ModuleList(TinyBlock(width) for _ in range(layers))

    def forward(self, x, t, label):
        h = self.inner(x.flatten(2).mT)
        embedding = self.label_embedding(label) + (t[:, None] / 1000).to(h.dtype)
        for block in self.blocks:
            h = block(h, embedding)
        return self.outer(h).mT.unflatten(2, x.shape[2:])


TINY_SPEC = agd.DenoiserSpec(
    sample="x",
    timestep="t",
    conditions=(agd.Condition("label", embedding=("label_embedding",), null=0),),
    attention=(agd.Site("blocks.*.attention", width=12, output=1, hidden="tokens"),),
    feed_forward=(agd.Site("blocks.*.mlp", width=12),),
    modulation=(agd.Site("blocks.*.modulation"),),
)


@dataclass
class Backbone:
    """A denoiser and how to call it; `inputs` gives its keyword arguments for a batch."""

    denoiser: nn.Module
    spec: agd.DenoiserSpec

    def inputs(self, batch=3, seed=0):
        random = torch.Generator().manual_seed(seed)
        shape = (batch, 3 if isinstance(self.denoiser, TinyDenoiser) else 2, 4, 4)
        table: dict[str, Any] = {
            self.spec.sample: torch.randn(shape, generator=random),
            self.spec.timestep: torch.randint(1000, (batch,), generator=random),
        }
        name = self.spec.conditions[0].argument
        if name == "encoder_hidden_states":
            table[name] = torch.randn(batch, 5, 6, generator=random)
        else:
            table[name] = torch.randint(1, 5, (batch,), generator=random)
        return table

    def __call__(self, **inputs):
        output = self.denoiser(**inputs)
        return output if isinstance(output, torch.Tensor) else output.sample

    def teacher(self, scheduler=None, **overrides):
        shape = {"sample_shape": (3, 4, 4)} if isinstance(self.denoiser, TinyDenoiser) else {}
        if self.spec.conditions[0].argument == "encoder_hidden_states":
            shape["null_condition"] = {"encoder_hidden_states": torch.zeros(1, 5, 6)}
        return agd.Teacher(self.denoiser, scheduler or DDIMScheduler(), self.spec, **shape, **overrides)


def make_backbone(name):
    if name == "tiny":
        return Backbone(TinyDenoiser().eval(), TINY_SPEC)
    denoiser = make_dit() if name == "dit" else make_unet()
    return Backbone(denoiser, find_spec(denoiser))


@pytest.fixture(params=["dit", "unet", "tiny"])
def backbone(request):
    return make_backbone(request.param)


@pytest.fixture
def dit():
    return make_backbone("dit")


@pytest.fixture
def unet():
    return make_backbone("unet")


@pytest.fixture
def tiny():
    return make_backbone("tiny")


def trained(adapter, scale=0.3):
    """Fill the projections that start at zero, so that the adapter has an effect."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.normal_(std=scale)
    return adapter


def double(denoiser):
    """A float64 copy, of an attached adapter too."""
    exact = copy.deepcopy(denoiser).double()
    if (attachment := attachment_of(exact)) is not None:
        attachment.adapter.double()
    return exact


def assert_as_exact(found, plain, reference):
    """`found` is off the float64 `reference` by at most twice what the plain path in its own dtype is, and a rounding.

    The plain path must itself hold half of its digits: a wrong reference or plain path would else excuse anything.
    """
    lost = (plain.double() - reference).abs().max()
    floor = torch.finfo(plain.dtype).eps * reference.abs().max()
    assert lost <= floor / math.sqrt(torch.finfo(plain.dtype).eps)
    assert (found.double() - reference).abs().max() <= 2 * lost + floor
