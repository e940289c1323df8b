"""Which sites and which sizes an adapter's config asks for, and what it refuses."""

from dataclasses import replace

import pytest

import agd_fast as agd
from agd_fast.attaching import layout_for
from agd_fast.sites import resolve_sites
from conftest import make_backbone


def test_blocks_choose_the_sites(tiny):
    def paths(*blocks):
        config = agd.AdapterConfig("offset", 4, blocks=blocks)
        return [site.path for site in layout_for(tiny.denoiser, config, tiny.spec).sites["offset"]]

    assert paths("attention") == ["blocks.0.attention", "blocks.1.attention"]
    assert paths("feed_forward") == ["blocks.0.mlp", "blocks.1.mlp"]
    assert paths("feed_forward", "attention") == [
        "blocks.0.attention", "blocks.0.mlp", "blocks.1.attention", "blocks.1.mlp",
    ]  # fmt: skip


def test_build_adapter_needs_sites(tiny):
    spec = agd.DenoiserSpec("x", "t", tiny.spec.conditions, attention=tiny.spec.attention)
    with pytest.raises(ValueError, match=r"'modulation' adapter needs modulation sites"):
        agd.attach(tiny.denoiser, spec=spec)
    with pytest.raises(ValueError, match=r"'offset' adapter needs feed_forward sites"):
        agd.attach(tiny.denoiser, agd.AdapterConfig("offset", blocks=("feed_forward",)), spec=spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lora"}, "kind must be one of 'modulation', 'gated_lora', 'cross_attention', 'offset', .*; found 'lora'"),
        ({"kind": "offset+"}, "kind must be one of .*; found ''"),
        ({"kind": "offset+offset"}, r"each kind once, found 'offset\+offset'"),
        ({"omega_features": "linear"}, "omega_features must be one of .* found 'linear'"),
        ({"blocks": ("mlp",)}, "blocks must be one of 'attention', 'feed_forward', 'convolution'; found 'mlp'"),
        ({"blocks": ()}, "at least one"),
        ({"layers": ()}, "layers must name at least one module, or be None for all; found none"),
        ({"sees": ("omega",)}, "sees must be one of 'time', 'conditions'; found 'omega'"),
        ({"guidance_range": (3.0, 3.0)}, r"low < high, found \(3.0, 3.0\)"),
        ({"guidance_range": (1, float("inf"))}, r"two finite numbers .*found \(1, inf\)"),
        ({"hidden": 0}, "hidden must be .* found 0"),
        ({"hidden": 1.5}, "hidden must be .* found 1.5"),
        ({"rank": 0}, "rank must be .* found 0"),
        ({"max_fraction": 0.0}, "max_fraction must be positive, found 0"),
        ({"hidden": 8, "heads": 3}, "heads=3, hidden=8"),
    ],
)
def test_adapter_config_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        agd.AdapterConfig(**options)


def test_adapter_config_round_trips():
    config = agd.AdapterConfig("offset", 8, 0.1, 3, 2, ("feed_forward",), "fourier", False, (2, 9))
    assert agd.AdapterConfig.from_dict(config.to_dict()) == config
    narrowed = replace(config, layers=("a", "b.*"), sees=())
    assert agd.AdapterConfig.from_dict(narrowed.to_dict()) == narrowed
    with pytest.raises(ValueError, match=r"missing \['heads'\], unknown \['depth'\]"):
        agd.AdapterConfig.from_dict({**{k: v for k, v in config.to_dict().items() if k != "heads"}, "depth": 1})


@pytest.mark.parametrize(("name", "kind"), [("dit", "modulation"), ("unet", "modulation+gated_lora"), ("tiny", "modulation")])
def test_a_config_without_a_kind_takes_that_of_the_backbone(name, kind):
    backbone = make_backbone(name)
    config = agd.attach(backbone.denoiser, agd.AdapterConfig(max_fraction=0.3), spec=backbone.spec).config
    assert config.kind == kind
    assert config.rank == (min(3 * config.hidden, 16) if "gated_lora" in kind else None)


@pytest.mark.parametrize(("name", "sites"), [("dit", ("attention", "feed_forward")), ("unet", ("convolution",))])
def test_gated_lora_is_beside_convolutions_where_there_are_any(name, sites):
    backbone = make_backbone(name)
    adapter = agd.attach(backbone.denoiser, agd.AdapterConfig("gated_lora", 2), spec=backbone.spec)
    expected = resolve_sites(backbone.denoiser, tuple(site for block in sites for site in getattr(backbone.spec, block)))
    assert adapter.layout.sites["gated_lora"] == expected
