"""Whole models on kernels: as exact as without, whatever the family, and nothing stale. On a CPU references run."""

import copy
from itertools import pairwise

import pytest
import torch
from agd_fast_kernels.layouts import channels_last
from torch import nn

import agd_fast as agd
from agd_fast import ops
from agd_fast.attaching import attachment_of, scoped
from agd_fast.engine import engine_of
from agd_fast.graph.capture import value_of
from conftest import Backbone, assert_as_exact, double, make_backbone, trained
from helpers_engine import add_lora, assert_same, call, programs, small_pipeline, twins
from helpers_families import attach_trained, denoisers, run
from helpers_pipelines import attach, sample
from test_engine_families import CAPTURED, NOT_AHEAD, assert_each_as_exact, record, scales_of
from tiny import FAMILIES

NO_KERNELS = ("deepfloyd_if", "cross_attention")  # its UNet has a gelu where others have a SiLU, and no feed-forward


@pytest.mark.parametrize("kind", [None, "cross_attention"])
@pytest.mark.parametrize("name", CAPTURED)
def test_every_family_is_as_exact_on_kernels(name, kind):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe, kind=kind)
    _, calls = record(pipe, family, **family.guided)
    agd.optimize(pipe, agd.EngineConfig(kernels="always"))
    run(pipe, family, **family.guided)
    for denoiser in denoisers(pipe).values():
        info = engine_of(denoiser).info()
        assert bool(info["kernels"]) == ((name, kind) != NO_KERNELS) and not info["plain_because"]
    assert_each_as_exact(pipe, calls, scales_of(family), ahead=name not in NOT_AHEAD)


def test_norms_and_low_rank_terms_take_images_as_they_lie():
    family = FAMILIES["sdxl"]
    plain, fast = twins(family.pipeline)
    agd.optimize(fast, agd.EngineConfig(channels_last=True, kernels="always"))
    found, expected = (sample(pipe, family, **family.guided, num_images_per_prompt=2) for pipe in (fast, plain))
    assert_same(found, expected)
    info = engine_of(fast.unet).info()
    assert info["kernels"].items() >= {"ada_group_norm": 17, "gated_lora": 16}.items() and not info["not_on_kernels"]
    nodes = [node for program in programs(fast.unet) for node in program.graph.nodes]
    for op, place in ((ops.ada_group_norm, 0), (ops.OPS["gated_lora"], 1)):
        pairs = [(value_of(node), value_of(node.args[place])) for node in nodes if node.target is op.overload]
        assert all(channels_last(found) == channels_last(image) for found, image in pairs)
        assert sum(channels_last(image) for _, image in pairs) > len(pairs) / 2


@pytest.mark.parametrize(
    ("name", "hidden", "absorbed"), [("dit", 2, False), ("dit", 40, True), ("unet", 4, False), ("unet", 40, True)]
)
@torch.no_grad()
def test_absorbed_adapters_run_in_their_blocks(name, hidden, absorbed):
    backbone = make_backbone(name)
    trained(agd.attach(backbone.denoiser, agd.AdapterConfig("cross_attention", hidden), spec=backbone.spec))
    inputs = {**backbone.inputs(), "timestep": torch.tensor(10)}
    if name == "dit":
        inputs["timestep"] = torch.full((3,), 10)
    with agd.guided(backbone.denoiser, 3.0):
        plain = backbone(**inputs)
    agd.optimize(backbone.denoiser, agd.EngineConfig(kernels="always"), spec=backbone.spec)
    for _ in range(2):
        with scoped(backbone.denoiser, torch.tensor([10])), agd.guided(backbone.denoiser, 3.0):
            found = backbone(**inputs)
    assert_same(found, plain)
    kernels = engine_of(backbone.denoiser).info()["kernels"]
    assert bool({"norm_scores", "projection_scores"} & kernels.keys()) == absorbed  # where tokens are fewer than channels


@torch.no_grad()
def test_thin_projections_in_another_dtype_than_the_model_ride_along():
    backbone = make_backbone("dit")
    trained(agd.attach(backbone.denoiser, agd.AdapterConfig("cross_attention", 8), spec=backbone.spec))
    backbone.denoiser.to(torch.bfloat16)
    attachment_of(backbone.denoiser).adapter.float()
    agd.optimize(backbone.denoiser, agd.EngineConfig(kernels="always", absorb=False), spec=backbone.spec)
    inputs = {**backbone.inputs(), "timestep": torch.full((3,), 10)}
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    for _ in range(2):
        with scoped(backbone.denoiser, torch.tensor([10])), agd.guided(backbone.denoiser, 3.0):
            found = backbone(**inputs)
    assert not engine_of(backbone.denoiser).info()["plain_because"]
    (program,) = programs(backbone.denoiser)
    assert sum(node.name.startswith("joined") for node in program.constants) == 2 * 2  # weight and bias, in two blocks
    agd.optimize(backbone.denoiser, None, spec=backbone.spec)
    exact = Backbone(double(backbone.denoiser), backbone.spec)
    with agd.guided(backbone.denoiser, 3.0), agd.guided(exact.denoiser, 3.0):
        wide = {**inputs, "hidden_states": inputs["hidden_states"].double()}
        assert_as_exact(found, backbone(**inputs), exact(**wide))


@torch.no_grad()
@pytest.mark.parametrize("change", ["wide in place", "thin in place", "wide anew", "bias in place"])
def test_joined_weights_follow_the_model(change):
    backbone = make_backbone("dit")
    adapter = trained(agd.attach(backbone.denoiser, agd.AdapterConfig("cross_attention", 8), spec=backbone.spec))
    twin = Backbone(copy.deepcopy(backbone.denoiser), backbone.spec)
    agd.optimize(backbone.denoiser, agd.EngineConfig(kernels="always", absorb=False), spec=backbone.spec)
    inputs = {**backbone.inputs(), "timestep": torch.full((3,), 10)}

    def compare():
        for _ in range(2):
            with scoped(backbone.denoiser, torch.tensor([10])), agd.guided(backbone.denoiser, 3.0):
                found = backbone(**inputs)
        (program,) = programs(backbone.denoiser)
        assert any(node.name.startswith("joined") for node in program.constants)
        with agd.guided(twin.denoiser, 3.0):
            plain = twin(**inputs)
        assert_same(found, plain)
        return plain

    before = compare()
    for denoiser, parts in ((backbone.denoiser, adapter), (twin.denoiser, attachment_of(twin.denoiser).adapter)):
        attention = denoiser.transformer_blocks[0].attn1
        wide = [attention.to_q, attention.to_k, attention.to_v]
        if change == "thin in place":
            next(one for name, one in parts.named_parameters() if name.endswith("query.weight")).mul_(2)
        for linear in wide if change != "thin in place" else ():
            if change == "wide in place":
                linear.weight.mul_(2)
            elif change == "wide anew":
                linear.weight = nn.Parameter(linear.weight * 2)
            else:
                linear.bias.add_(1)
    assert (compare() - before).abs().max() > 1e-3 * before.abs().max()


def test_changes_of_the_model_are_followed():
    plain, fast = twins(small_pipeline)
    agd.optimize(fast, agd.EngineConfig(kernels="always"))

    def compare():
        for _ in range(2):
            found, expected = call(fast), call(plain)
            assert_same(found, expected)
        assert engine_of(fast.unet).info()["kernels"]
        return expected

    seen = [compare()]
    for pipe in (plain, fast):
        add_lora(pipe)
    seen.append(compare())
    for pipe in (plain, fast):
        pipe.unet.delete_adapters("style")
    seen.append(compare())
    with torch.no_grad():
        for pipe in (plain, fast):
            pipe.unet.conv_out.weight.mul_(1.5)
    seen.append(compare())
    assert all((one - other).abs().max() > 1e-4 for one, other in pairwise(seen))
    with agd.disabled(plain), agd.disabled(fast):
        compare()


@pytest.mark.parametrize(("name", "value"), [("kernels", "sometimes"), ("kernels", True)])
def test_an_unknown_policy_names_the_known_ones(name, value):
    with pytest.raises(ValueError, match="kernels must be one of 'auto', 'always', 'never'; found"):
        agd.EngineConfig(**{name: value})


def test_the_environment_decides_where_nothing_else_does(monkeypatch):
    monkeypatch.setenv("AGD_FAST_KERNELS", "always")
    pipe = small_pipeline()
    attach(pipe)
    agd.optimize(pipe)
    call(pipe)
    assert agd.info(pipe)["engine"]["kernels"]
    agd.optimize(pipe, agd.EngineConfig(kernels="never"))
    call(pipe)
    assert agd.info(pipe)["engine"]["kernels"] == agd.info(pipe)["engine"]["not_on_kernels"] == {}
    monkeypatch.setenv("AGD_FAST_KERNELS", "perhaps")
    call(pipe)  # which says for itself
    with pytest.raises(ValueError, match="environment variable AGD_FAST_KERNELS must be one of"):
        agd.optimize(pipe)
    assert engine_of(pipe.unet).config.kernels == "never"  # nothing was changed
