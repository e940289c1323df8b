"""AdapterConfig.layers, for any kind of adapter, and files from before there were any."""

import json

import pytest
import torch

import agd_fast as agd
from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import layout_for
from agd_fast.families import find_spec
from agd_fast.sources import CONFIG_NAME
from conftest import trained
from helpers_reference import DOWN, UP, calls_of, make_base, run


@pytest.fixture
def unet():
    return make_base("unet")


def test_layers_narrow_the_sites(unet):
    def paths(*layers, kind="offset"):
        config = AdapterConfig(kind, 4, layers=layers, rank=2)
        return {kind: [s.path for s in sites] for kind, sites in layout_for(unet, config, find_spec(unet)).sites.items()}

    assert paths(UP, DOWN) == {"offset": [DOWN, UP]}
    assert paths("down_blocks.*.attn2") == {"offset": [DOWN, DOWN.replace("blocks.0.a", "blocks.1.a")]}
    two = paths("conv_norm_out", "mid_block.resnets.*.conv1", kind="modulation+gated_lora")
    assert two == {"modulation": ["conv_norm_out"], "gated_lora": ["mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"]}


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("offset", ("conv_in",), r"layers must be among '\*\.attn2'; found 'conv_in'"),
        ("offset", ("up_blocks.9.attn2",), r"matches the path 'up_blocks.9.attn2'; modules nearest to it: up_blocks"),
        ("modulation+offset", (UP,), "layers leave a 'modulation' adapter no site"),
    ],
)
def test_layers_that_are_no_sites(unet, kind, layers, message):
    with pytest.raises(ValueError, match=message):
        agd.attach(unet, AdapterConfig(kind, 4, layers=layers))


def test_layers_round_trip_through_files(unet, tmp_path):
    trained(agd.attach(unet, AdapterConfig("cross_attention", 4, layers=(UP, "mid_block.*.attn2"), sees=("time",))))
    calls = calls_of("unet-attention")
    with torch.no_grad(), agd.guided(unet, 3.0):
        expected = run(unet, calls)
    agd.save(unet, tmp_path)
    agd.unload(unet)
    with torch.no_grad(), agd.guided(agd.load(unet, tmp_path), 3.0):
        assert torch.equal(run(unet, calls), expected)


def test_files_of_before_layers_and_sees_still_load(unet, tmp_path):
    agd.attach(unet, AdapterConfig("offset", 4))
    agd.save(unet, tmp_path)
    entries = json.loads((tmp_path / CONFIG_NAME).read_text())["adapter"]
    assert not {"layers", "sees"} & set(entries)
    assert AdapterConfig.from_dict(entries) == AdapterConfig("offset", 4)
