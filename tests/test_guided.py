"""Forwards inside agd.guided and agd.disabled: at which ω, with which inputs, and what is refused."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import agd_fast as agd
from agd_fast.attaching import attachment_of
from conftest import TINY_SPEC, assert_as_exact, double, make_backbone, trained
from helpers_attaching import CONFIGS, attach, every_config, guided


def rows(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


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
