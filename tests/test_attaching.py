"""Putting an adapter on, taking it off, and being inert in between."""

import copy
import json
import pickle

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import agd_fast as agd
from agd_fast.attaching import attachment_of, denoiser_of
from conftest import TINY_SPEC, TinyAttention, make_backbone, trained
from helpers_attaching import CONFIGS, TWO_PARTS, attach, every_config, guided, trace


@every_config
def test_attach_creates_an_adapter_that_changes_nothing(backbone, config):
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    attach(backbone, config)
    assert torch.equal(guided(backbone, inputs), base)
    assert torch.equal(guided(backbone, inputs, [1.0, 2.5, 6.0]), base)


@every_config
def test_attached_adapter_is_inert_until_guided(backbone, config):
    inputs = backbone.inputs()
    base = backbone(**inputs)
    trained(attach(backbone, config))
    assert torch.equal(backbone(**inputs), base)
    assert not torch.equal(guided(backbone, inputs), base)
    assert torch.equal(backbone(**inputs), base)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CONFIGS), min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["dit", "unet", "tiny"])
def test_unload_leaves_no_trace(name, configs):
    backbone = make_backbone(name)
    inputs, before, state = backbone.inputs(), trace(backbone.denoiser), copy.deepcopy(backbone.denoiser.state_dict())
    base = backbone(**inputs)
    for config in configs:
        trained(attach(backbone, config))
        guided(backbone, inputs)
        assert agd.unload(backbone.denoiser) is backbone.denoiser
        assert trace(backbone.denoiser) == before
        assert torch.equal(backbone(**inputs), base)
    assert all(torch.equal(value, state[name]) for name, value in backbone.denoiser.state_dict().items())


def test_two_parts_at_one_module_act_each_as_it_does_alone(backbone):
    """With one of them zero, the other is what it would be without it."""
    inputs, kinds = backbone.inputs(), TWO_PARTS.kinds
    both = trained(attach(backbone, TWO_PARTS))
    at_one = [part.site.path for part in both.parts["cross_attention"].sites]
    assert at_one and set(at_one) <= {part.site.path for part in both.parts["gated_lora"].sites}
    weights, together = copy.deepcopy(both.state_dict()), guided(backbone, inputs)
    zeros = {"gated_lora": "up.", "cross_attention": "out."}
    left = {}
    for kind, other in (kinds, kinds[::-1]):
        both.load_state_dict({n: v * 0 if f"{other}.sites" in n and zeros[other] in n else v for n, v in weights.items()})
        left[kind] = guided(backbone, inputs)
        assert not torch.equal(left[kind], together)
    agd.unload(backbone.denoiser)
    for kind, expected in left.items():
        own = {name: value for name, value in weights.items() if name.startswith(("conditioning.", f"parts.{kind}."))}
        rank = both.config.rank if kind == "gated_lora" else None
        attach(backbone, agd.AdapterConfig(kind, 4, rank=rank, blocks=TWO_PARTS.blocks)).load_state_dict(own)
        assert torch.equal(guided(backbone, inputs), expected)
        agd.unload(backbone.denoiser)


def test_unload_takes_two_parts_off_a_module_that_was_wrapped_meanwhile(tiny):
    attention = tiny.denoiser.blocks[0].attention
    attach(tiny, TWO_PARTS)
    assert len(attention._forward_hooks) == 1  # of both parts
    tiny.denoiser.blocks[0].attention = torch.nn.Sequential(attention)
    agd.unload(tiny.denoiser)
    assert (type(attention), len(attention._forward_hooks)) == (TinyAttention, 0)
    assert "_agd_sites" not in vars(attention)


def test_unload_keeps_the_hooks_of_others(dit):
    calls, linear = [], dit.denoiser.transformer_blocks[0].norm1.linear
    linear.register_forward_hook(lambda *_: calls.append("before"))
    attach(dit)
    linear.register_forward_hook(lambda *_: calls.append("after"))
    agd.unload(dit.denoiser)
    dit(**dit.inputs())
    assert calls == ["before", "after"]


def test_unload_finds_a_site_that_was_wrapped_meanwhile(tiny):
    linear = tiny.denoiser.blocks[0].modulation
    attach(tiny)
    tiny.denoiser.blocks[0].modulation = torch.nn.Sequential(linear)
    agd.unload(tiny.denoiser)
    assert type(linear) is torch.nn.Linear
    assert not linear._forward_hooks
    assert "_agd_sites" not in vars(linear)


def test_unload_without_an_adapter_does_nothing(dit):
    before = trace(dit.denoiser)
    assert agd.unload(dit.denoiser) is dit.denoiser
    assert trace(dit.denoiser) == before


def test_a_denoiser_on_several_devices_is_refused(dit):
    dit.denoiser.hf_device_map = {"transformer_blocks.0": 0, "transformer_blocks.1": 1, "proj_out_1": "cpu"}
    with pytest.raises(
        ValueError, match=r"DiTTransformer2DModel lies on several devices \(0, 1\); an adapter needs all of it on"
    ):
        attach(dit)
    dit.denoiser.hf_device_map = {"transformer_blocks": 0, "proj_out_1": "cpu"}
    attach(dit)


def test_attach_twice_is_an_error(backbone):
    attach(backbone)
    before = trace(backbone.denoiser)
    with pytest.raises(ValueError, match=r"already has an adapter; expected agd_fast.unload.* or a fresh model to load"):
        attach(backbone)
    assert trace(backbone.denoiser) == before


def test_attach_takes_teacher_and_denoiser(tiny):
    teacher = tiny.teacher()
    adapter = agd.attach(teacher, CONFIGS[0])
    assert denoiser_of(teacher) is tiny.denoiser
    assert attachment_of(tiny.denoiser).adapter is adapter
    with pytest.raises(TypeError, match=r"expected a denoiser .*found dict"):
        agd.attach({})


@pytest.mark.parametrize(
    ("site", "message"),
    [
        (agd.Site("blocks.*.attn"), r"no module of TinyDenoiser matches the path 'blocks\.\*\.attn'.*blocks\.0\.att"),
        (agd.Site("blocks.*.modulation", width=12), "width mismatch at 'blocks.0.modulation'.*width=12.*Linear .* 36"),
        (agd.Site("blocks.*.modulation", input_width=36), "width mismatch .* says input_width=36.*Linear .* 12"),
        (agd.Site("blocks.*.attention"), r"width of 'blocks.0.attention' cannot be read off a TinyAttention; .*width="),
    ],
)
def test_attach_names_what_is_wrong_with_a_site(tiny, site, message):
    before = trace(tiny.denoiser)
    with pytest.raises(ValueError, match=message):
        agd.attach(tiny.denoiser, spec=agd.DenoiserSpec("x", "t", TINY_SPEC.conditions, modulation=(site,)))
    assert trace(tiny.denoiser) == before


@pytest.mark.parametrize(("name", "cls"), [("dit", DiTTransformer2DModel), ("unet", UNet2DConditionModel)])
def test_save_pretrained_with_an_adapter_attached_writes_the_base(name, cls, tmp_path):
    backbone = make_backbone(name)
    inputs, state = backbone.inputs(), copy.deepcopy(backbone.denoiser.state_dict())
    base = backbone(**inputs)
    trained(attach(backbone))
    with agd.guided(backbone.denoiser, 2.0):
        backbone.denoiser.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == cls.__name__
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == state.keys()
    backbone.denoiser = cls.from_pretrained(tmp_path)
    assert type(backbone.denoiser) is cls
    assert all(torch.equal(value, state[key]) for key, value in backbone.denoiser.state_dict().items())
    assert torch.equal(backbone(**inputs), base)


def test_attached_modules_are_named_as_before(dit):
    attach(dit)
    linear = dit.denoiser.transformer_blocks[0].norm1.linear
    for module, cls in ((dit.denoiser, DiTTransformer2DModel), (linear, torch.nn.Linear)):
        found = type(module)
        assert isinstance(module, cls)
        assert found is not cls
        assert (found.__name__, found.__qualname__, found.__module__) == (
            cls.__name__,
            cls.__qualname__,
            cls.__module__,
        )
        assert found.forward is cls.forward


COPIES = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize("copier", COPIES)
@pytest.mark.parametrize("config", [CONFIGS[0], TWO_PARTS], ids=["one-part", "two-parts"])
def test_copies_carry_an_adapter_of_their_own(backbone, copier, armed, config):
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    trained(attach(backbone, config))
    expected = guided(backbone, inputs)
    if armed:
        with agd.guided(backbone.denoiser, 5.0), agd.disabled(backbone.denoiser):
            other = type(backbone)(COPIES[copier](backbone.denoiser), backbone.spec)
    else:
        other = type(backbone)(COPIES[copier](backbone.denoiser), backbone.spec)
    assert torch.equal(other(**inputs), base)
    assert torch.equal(guided(other, inputs), expected)
    with agd.guided(other.denoiser, 5.0):
        assert torch.equal(backbone(**inputs), base)
    with torch.no_grad():
        for parameter in attachment_of(other.denoiser).adapter.parameters():
            parameter.zero_()
    assert torch.equal(guided(backbone, inputs), expected)
    agd.unload(other.denoiser)
    assert torch.equal(guided(backbone, inputs), expected)
    assert torch.equal(other(**inputs), base)
    assert not any(hasattr(type(module), "_agd_base") for module in other.denoiser.modules())


def test_copy_of_a_compiled_denoiser_with_an_adapter(dit):
    trained(attach(dit))
    inputs = dit.inputs()
    expected = guided(dit, inputs)
    dit.denoiser.compile(backend="eager")
    guided(dit, inputs)
    for copier in COPIES.values():
        assert torch.equal(guided(type(dit)(copier(dit.denoiser), dit.spec), inputs), expected)


@every_config
def test_info_says_what_is_attached(backbone, config):
    denoiser = backbone.denoiser
    assert agd.info()["environment"]["torch"] == torch.__version__
    assert agd.info(denoiser)["adapter"] is None
    adapter = attach(backbone, config)
    found = agd.info(denoiser)
    base = sum(parameter.numel() for parameter in denoiser.parameters())
    own = sum(parameter.numel() for parameter in adapter.parameters())
    assert found["denoiser"] == {"class": type(denoiser).__name__, "parameters": base}
    assert found["adapter"] == {
        "kind": config.kind,
        "hidden": 4,
        "sites": [part.site.path for part in adapter.sites],
        "parameters": own,
        "fraction": own / base,
        "guidance_range": [1.0, 6.0],
        "enabled": True,
        "armed": False,
    }
    with agd.guided(denoiser, 2.0), agd.disabled(denoiser):
        assert agd.info(denoiser)["adapter"]["armed"]
        assert not agd.info(denoiser)["adapter"]["enabled"]
