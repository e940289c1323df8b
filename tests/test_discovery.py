"""A spec proposed for a denoiser that no family describes, and what is said of one that cannot be described."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FluxTransformer2DModel, LatteTransformer3DModel
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.families import SPECS, find_spec
from conftest import TinyDenoiser, trained
from tiny._parts import lively


class Attention(nn.Module):
    """With the names of diffusers' projections, and no class of it."""

    def __init__(self, width):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Identity())

    def forward(self, hidden_states):
        scores = self.to_q(hidden_states) @ self.to_k(hidden_states).mT / math.sqrt(hidden_states.shape[-1])
        return self.to_out(scores.softmax(-1) @ self.to_v(hidden_states))


class Own(nn.Module):
    """x [B, 3, H, W], sigma [B] → [B, 3, H, W]; `label` is known to no habit of naming."""

    def __init__(self, width=12):
        super().__init__()
        self.inner, self.attention, self.outer = nn.Linear(3, width), Attention(width), nn.Linear(width, 3)
        self.labels = nn.Embedding(5, width)

    def forward(self, x, sigma, label=None):
        h = self.inner(x.flatten(2).mT) + sigma[:, None, None] / 1000
        h = h if label is None else h + self.labels(label)[:, None]
        return self.outer(h + self.attention(h)).mT.unflatten(2, x.shape[2:])


def own():
    random = torch.Generator().manual_seed(0)
    return Own(), {"x": torch.randn(2, 3, 4, 4, generator=random), "sigma": torch.tensor([900.0, 20.0])}


def flux():
    random = torch.Generator().manual_seed(0)
    denoiser = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=8,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 8),
    )
    shapes = {"hidden_states": (2, 6, 4), "encoder_hidden_states": (2, 5, 12), "pooled_projections": (2, 8)}
    inputs = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return lively(denoiser), {
        **inputs,
        "timestep": torch.tensor([0.9, 0.1]),
        "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def latte():
    """Its prompt has 8 channels, which it projects to the 16 of its cross-attention."""
    random = torch.Generator().manual_seed(0)
    denoiser = LatteTransformer3DModel(
        sample_size=4,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=4,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    shapes = {"hidden_states": (2, 4, 3, 4, 4), "encoder_hidden_states": (2, 5, 8)}
    inputs = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    return lively(denoiser), {**inputs, "timestep": torch.tensor([900.0, 20.0])}


def predict(denoiser, inputs):
    output = denoiser(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("make", [flux, latte, own])
def test_a_discovered_spec_attaches_a_zero_adapter_that_changes_nothing_and_a_trained_one_that_does(make):
    denoiser, inputs = make()
    base = predict(denoiser, inputs)
    spec = agd.discover(denoiser)
    adapter = agd.attach(denoiser, agd.AdapterConfig(hidden=2), spec=spec)
    with agd.guided(denoiser, [2.0, 4.0]):
        zero = predict(denoiser, inputs)
        trained(adapter)
        changed = predict(denoiser, inputs)
    assert torch.equal(zero, base)
    assert all(not torch.equal(one, other) for one, other in zip(changed, base, strict=True))
    assert torch.equal(predict(agd.unload(denoiser), inputs), base)


def test_discovered_specs_name_the_arguments_and_sites():
    found = agd.discover(flux()[0])
    assert (found.sample, found.timestep, found.adapter_kind) == ("hidden_states", "timestep", "modulation")
    assert [(one.argument, one.width) for one in found.conditions] == [("encoder_hidden_states", 12)]
    assert [site.path for site in found.attention] == ["transformer_blocks.0.attn"]
    assert [site.path for site in found.modulation] == [
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
        "norm_out.linear",
    ]
    assert agd.discover(latte()[0]).conditions[0].width == 8
    found = agd.discover(own()[0])
    assert (found.sample, found.timestep, found.conditions, found.adapter_kind) == ("x", "sigma", (), "offset")
    assert found.attention == (agd.Site("attention", width=12, input_width=12),)


@pytest.mark.parametrize("kind", ["modulation", "cross_attention", "offset"])
def test_every_kind_that_a_discovered_spec_has_sites_for_can_be_attached(kind):
    denoiser, inputs = flux()
    base = predict(denoiser, inputs)
    agd.attach(denoiser, agd.AdapterConfig(kind, hidden=2), spec=agd.discover(denoiser))
    with agd.guided(denoiser, 3.0):
        assert torch.equal(predict(denoiser, inputs), base)


def test_a_discovered_spec_completed_by_hand_is_distilled(tmp_path):
    denoiser = Own()
    spec = agd.discover(denoiser)
    label = agd.Condition("label", embedding=("labels",), null=4)
    spec = agd.DenoiserSpec(**{**vars(spec), "conditions": (label,)})
    teacher = agd.Teacher(denoiser, DDIMScheduler(clip_sample=False), spec, sample_shape=(3, 4, 4))
    result = agd.distill(
        teacher,
        output_dir=tmp_path,
        class_labels=range(4),
        adapter=agd.AdapterConfig(hidden=4),
        trajectories=8,
        sampling_steps=4,
        train_config=TrainConfig(steps=60, batch_size=16),
        validation=4,
        progress=False,
    )
    assert attachment_of(teacher) is not None
    assert result.explained.mean > 0


def test_what_cannot_be_discovered_is_said_with_an_example():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention(4)

        def forward(self, x):
            return self.attention(x)

    with pytest.raises(ValueError, match=r"expected a timestep argument in Still, whose forward takes \['x'\].*DenoiserSpec\("):
        agd.discover(Still())
    with pytest.raises(ValueError, match=r"attention blocks \(modules with to_q and to_out\) in TinyDenoiser.*DenoiserSpec\("):
        agd.discover(TinyDenoiser())


def test_an_unknown_class_is_told_what_is_known_and_how_to_describe_itself():
    with pytest.raises(TypeError) as raised:
        find_spec(Own())
    message = str(raised.value)
    assert "no DenoiserSpec is known for Own" in message
    assert all(name in message for name in SPECS)
    example = message[message.index("agd_fast.DenoiserSpec(") : message.index("), or let") + 1].removesuffix(")")
    spec = eval(example, {"agd_fast": agd})  # what is shown can be run
    assert isinstance(spec, agd.DenoiserSpec)
    assert "spec=agd_fast.discover(denoiser)" in message
