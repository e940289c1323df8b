"""Putting an adapter on, taking it off, and being inert in between."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import agd_fast as agd
from agd_fast.attaching import attachment_of, denoiser_of
from conftest import TINY_SPEC, TinyAttention, assert_as_exact, double, make_backbone, trained

CONFIGS = [
    agd.AdapterConfig("modulation", 4),
    agd.AdapterConfig("offset", 4, blocks=("attention", "feed_forward")),
    agd.AdapterConfig("cross_attention", 4),
    agd.AdapterConfig("cross_attention", 4, blocks=("feed_forward",), omega_features="fourier", identity_at_one=False),
    agd.AdapterConfig("gated_lora+cross_attention", 4, blocks=("attention",)),  # both at the attention blocks
]
config_ids = ["modulation", "offset-both", "cross_attention", "cross_attention-ff-paper", "two-parts"]
TWO_PARTS = CONFIGS[-1]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=config_ids)


def attach(backbone, config=CONFIGS[0]):
    return agd.attach(backbone.denoiser, config, spec=backbone.spec)


@torch.no_grad()
def guided(backbone, inputs, scale=3.0):
    with agd.guided(backbone.denoiser, scale):
        return backbone(**inputs)


def rows(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


def trace(denoiser):
    """All that attaching may touch: classes, attributes and hooks of every module."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
    hooks += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_buffers", "_parameters", "_modules")
    return {
        name: (type(module), sorted(vars(module)), [list(vars(module)[hook].items()) for hook in hooks])
        for name, module in denoiser.named_modules()
    }


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


@every_config
def test_guided_at_one_is_the_base(backbone, config):
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    trained(attach(backbone, config))
    assert torch.equal(guided(backbone, inputs, 1.0), base) == config.identity_at_one
    mixed = guided(backbone, inputs, [1.0, 3.0, 1.0])
    assert torch.equal(mixed[::2], base[::2]) == config.identity_at_one
    assert not torch.equal(mixed[1], base[1])


def test_guided_takes_a_number_a_list_or_a_tensor(backbone):
    trained(attach(backbone))
    inputs = backbone.inputs()
    expected = guided(backbone, inputs, 2.5)
    for scale in ([2.5], [2.5] * 3, torch.tensor(2.5), torch.full((3,), 2.5, dtype=torch.float64)):
        assert torch.equal(guided(backbone, inputs, scale), expected)


@pytest.mark.parametrize("name", ["dit", "unet", "tiny"])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(scales=st.lists(st.floats(1.0, 6.0, width=32), min_size=1, max_size=5), config=st.sampled_from(CONFIGS[:-1]))
def test_guided_per_sample_equals_one_by_one(name, scales, config):
    backbone = make_backbone(name)
    trained(attach(backbone, config))
    exact = type(backbone)(double(backbone.denoiser), backbone.spec)
    inputs = backbone.inputs(len(scales))
    one_by_one = torch.cat([guided(backbone, rows(inputs, i), scale) for i, scale in enumerate(scales)])
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    reference = torch.cat([guided(exact, rows(exact_inputs, i), scale) for i, scale in enumerate(scales)])
    assert_as_exact(guided(backbone, inputs, scales), one_by_one, reference)


def test_omega_of_each_sample_reaches_that_sample_alone(backbone):
    trained(attach(backbone))
    inputs = backbone.inputs()
    low, mixed = guided(backbone, inputs, [2.0, 2.0, 2.0]), guided(backbone, inputs, [2.0, 5.0, 2.0])
    assert torch.equal(low[::2], mixed[::2])
    assert not torch.equal(low[1], mixed[1])


def test_omega_offset_is_the_familys_convention(tiny):
    trained(attach(tiny))
    inputs = tiny.inputs()
    expected = guided(tiny, inputs, 3.0)
    attachment_of(tiny.denoiser).spec = agd.DenoiserSpec(**{**vars(TINY_SPEC), "omega_offset": 1.0})
    assert torch.equal(guided(tiny, inputs, 2.0), expected)


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


def test_attach_twice_is_an_error(backbone):
    attach(backbone)
    before = trace(backbone.denoiser)
    with pytest.raises(ValueError, match=r"already has an adapter; expected agd_fast.unload"):
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


def test_guided_names_a_site_whose_output_is_not_as_the_spec_says(tiny):
    site = agd.Site("blocks.*.mlp", width=13)
    spec = agd.DenoiserSpec("x", "t", TINY_SPEC.conditions, feed_forward=(site,))
    agd.attach(tiny.denoiser, agd.AdapterConfig("offset", 4, blocks=("feed_forward",)), spec=spec)
    with pytest.raises(ValueError, match=r"width mismatch at 'blocks.0.mlp'.* 13 channels at dimension -1.*\(3, 16, 12\)"):
        guided(tiny, tiny.inputs())


def test_guided_without_an_adapter_is_an_error(dit):
    with (
        pytest.raises(ValueError, match=r"no adapter is attached to this DiTTransformer2DModel"),
        agd.guided(dit.denoiser, 2),
    ):
        pass


@pytest.mark.parametrize("scales", [[2.0, 3.0], [2.0] * 4])
def test_guided_with_another_batch_is_double_guidance(backbone, scales):
    attach(backbone)
    with pytest.raises(ValueError, match=rf"ω for {len(scales)} samples.* batch of 3.*double guidance"):
        guided(backbone, backbone.inputs(), scales)


def test_guided_with_a_cfg_batch_is_double_guidance(backbone):
    attach(backbone)
    doubled = {name: torch.cat([value, value]) for name, value in backbone.inputs().items()}
    with pytest.raises(ValueError, match=r"ω for 3 samples.* batch of 6"):
        guided(backbone, doubled, [2.0, 3.0, 4.0])


def test_guided_names_a_missing_condition(dit, unet):
    attach(dit)
    attach(unet)
    with pytest.raises(ValueError, match=r"condition 'class_labels', which this call of DiTTransformer2DModel does not"):
        guided(dit, {"hidden_states": torch.randn(1, 2, 4, 4), "timestep": torch.tensor([3])})
    with pytest.raises(ValueError, match=r"condition 'encoder_hidden_states'"):
        guided(unet, {**unet.inputs(), "encoder_hidden_states": None})


def test_guided_reads_positional_arguments_and_any_timestep(unet):
    trained(attach(unet))
    inputs = {**unet.inputs(), "timestep": torch.full((3,), 7)}
    expected = guided(unet, inputs)
    x, prompt = inputs["sample"], inputs["encoder_hidden_states"]
    with torch.no_grad(), agd.guided(unet.denoiser, 3.0):
        for t in (7, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)):
            assert torch.equal(unet.denoiser(x, t, prompt, return_dict=False)[0], expected)


@pytest.mark.parametrize(("scale", "warns"), [(1.0, 0), (6.0, 0), (6.01, 1), (0.9, 1), ([2.0, 7.0], 1), (1.5, 0)])
def test_guided_outside_the_trained_range_warns(dit, scale, warns):
    attach(dit)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with agd.guided(dit.denoiser, scale):
            pass
    assert [("lies outside [1, 6]" in str(w.message), w.filename) for w in seen] == [(True, __file__)] * warns


def test_guided_and_disabled_nest(backbone):
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    trained(attach(backbone))
    two, three = guided(backbone, inputs, 2.0), guided(backbone, inputs, 3.0)
    denoiser = backbone.denoiser
    with torch.no_grad(), agd.guided(denoiser, 2.0):
        with agd.guided(denoiser, 3.0):
            assert torch.equal(backbone(**inputs), three)
            with agd.disabled(denoiser):
                assert torch.equal(backbone(**inputs), base)
                with agd.guided(denoiser, 2.0), agd.disabled(denoiser):
                    assert torch.equal(backbone(**inputs), base)
                assert torch.equal(backbone(**inputs), base)
            assert torch.equal(backbone(**inputs), three)
        assert torch.equal(backbone(**inputs), two)
    assert torch.equal(backbone(**inputs), base)


def test_disabled_without_an_adapter_is_the_base(dit):
    inputs = dit.inputs()
    with agd.disabled(dit.denoiser):
        assert torch.equal(dit(**inputs), dit(**inputs))


@pytest.mark.parametrize("where", ["site", "input"])
def test_an_exception_in_a_forward_leaves_nothing_armed(backbone, where):
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    adapter = trained(attach(backbone))
    last = backbone.denoiser.get_submodule(list(adapter.sites)[-1].site.path)
    handle = (last if where == "site" else backbone.denoiser).register_forward_hook(lambda *_: 1 / 0)
    with torch.no_grad(), agd.guided(backbone.denoiser, 3.0):
        with pytest.raises(ZeroDivisionError):
            backbone(**inputs)
        handle.remove()
        with agd.disabled(backbone.denoiser):
            assert torch.equal(backbone(**inputs), base)
    handle = last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        guided(backbone, inputs)
    handle.remove()
    assert attachment_of(backbone.denoiser).omega is None
    assert torch.equal(backbone(**inputs), base)


@every_config
def test_gradient_reaches_the_adapter_alone(backbone, config):
    backbone.denoiser.requires_grad_(False)
    adapter = trained(attach(backbone, config))
    with agd.guided(backbone.denoiser, 3.0):
        backbone(**backbone.inputs()).square().sum().backward()
    assert all(parameter.grad is None for parameter in backbone.denoiser.parameters())
    without = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_adapter_moved_in_inference_mode_can_still_be_trained(dit):
    adapter = attach(dit)
    adapter.to("meta")
    adapter.to = lambda device: adapter.to_empty(device=device)
    with torch.inference_mode(), agd.guided(dit.denoiser, 3.0):
        dit(**dit.inputs())
    assert not any(parameter.is_meta or parameter.is_inference() for parameter in adapter.parameters())


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


def test_guided_below_a_range_that_starts_above_one_warns(dit):
    attach(dit, agd.AdapterConfig(hidden=2, guidance_range=(3.0, 6.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 3.0, [1.0, 6.0]):
            with agd.guided(dit.denoiser, scale):
                pass
    for scale in (1.5, 6.1, [3.0, 0.5]):
        with pytest.warns(UserWarning, match="lies outside"), agd.guided(dit.denoiser, scale):
            pass


@pytest.mark.parametrize(
    ("scale", "found"), [(torch.ones(2, 2), r"shape \(2, 2\)"), (float("nan"), "nan"), ([2.0, math.inf], "inf")]
)
def test_guided_takes_finite_scales_of_one_dimension(dit, scale, found):
    attach(dit, agd.AdapterConfig(hidden=2))
    with pytest.raises(ValueError, match=f"finite guidance scale.*{found}"), agd.guided(dit.denoiser, scale):
        pass
