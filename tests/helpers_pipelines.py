"""Calls of tiny pipelines and denoisers that carry adapters, and copies of them in float64."""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of, component_of, denoiser_of
from agd_fast.attaching.hooks import prepare_forward
from agd_fast.attaching.steps import before_forward
from conftest import double, make_dit, trained
from tiny import sd15
from tiny._parts import lively

SCALE = 4.0


def attach(model, **config):
    """An adapter that has an effect, the same for the same denoiser."""
    torch.manual_seed(1)
    return trained(agd.attach(model, agd.AdapterConfig(**{"hidden": 2, **config})))


def noise(count, channels=4, seed=0):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sample(pipe, family, count=1, **arguments):
    """Latents, or images, of one call with the same seed each time."""
    generator = torch.Generator().manual_seed(3)
    return pipe(**{**family.inputs(count), **family.call, "generator": generator, **arguments})[0]


@contextmanager
def forwards(model):
    """The batch size of every forward of a denoiser, compiled or not."""
    seen = []

    def note(args, kwargs):
        seen.append(len(args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))))

    with before_forward(component_of(model), note):
        yield seen


def quiet(pipe):
    """A pipeline in which a call left nothing behind: disarmed, without hooks of ours, with the scheduler's own step."""
    attachment = attachment_of(pipe)
    hooks = list(pipe.unet._forward_pre_hooks.values())
    return attachment.omega is None and attachment.enabled and hooks == [prepare_forward] and "step" not in vars(pipe.scheduler)


@contextmanager
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def exact(pipe):
    """A float64 copy of a pipeline, of an attached adapter too."""
    other = copy.deepcopy(pipe)
    for name, module in other.components.items():
        if isinstance(module, nn.Module):
            setattr(other, name, module.double())
    if (attachment := attachment_of(other)) is not None:
        attachment.adapter.double()
    return other


@dataclass
class Model:
    """A tiny denoiser of diffusers and arguments of its call."""

    denoiser: nn.Module
    inputs: dict[str, Any]

    def __call__(self, scale=None, denoiser=None, **changes):
        denoiser = self.denoiser if denoiser is None else denoiser
        if scale is None:
            return denoiser(**{**self.inputs, **changes}, return_dict=False)[0]
        with agd.guided(denoiser, scale):
            return denoiser(**{**self.inputs, **changes}, return_dict=False)[0]

    def copy(self):
        return replace(self, denoiser=copy.deepcopy(self.denoiser))

    def exact(self):
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in self.inputs.items()}
        return Model(double(self.denoiser), inputs)

    @property
    def attachment(self):
        return attachment_of(denoiser_of(self.denoiser))


def model(name):
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    t = torch.tensor([900, 20])
    if name == "unet":
        prompt = torch.randn(2, 5, 16, generator=random)
        return Model(sd15.unet(), {"sample": noise(2), "timestep": t, "encoder_hidden_states": prompt})
    if name == "dit":
        labels = torch.tensor([1, 3])
        return Model(lively(make_dit()), {"hidden_states": noise(2, 2), "timestep": t, "class_labels": labels})
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16}
    sizes |= {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "pos_embed_max_size": 8}
    transformer = lively(SD3Transformer2DModel(**sizes, pooled_projection_dim=6))
    inputs = {"hidden_states": noise(2), "timestep": t.float(), "encoder_hidden_states": torch.randn(2, 5, 12, generator=random)}
    return Model(transformer, {**inputs, "pooled_projections": torch.randn(2, 6, generator=random)})


CLASSES = {"unet": UNet2DConditionModel, "dit": DiTTransformer2DModel, "sd3": SD3Transformer2DModel}
MODELS = tuple(CLASSES)
