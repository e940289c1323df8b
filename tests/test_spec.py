"""What is said about a denoiser, and how it is found in one."""

import inspect
import json

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

import agd_fast as agd
from agd_fast.attaching import layout_for
from agd_fast.families import SPECS, VARIANTS, find_spec
from agd_fast.forward import nest
from agd_fast.sites import Layout, config_value, find_modules, label_count, module_widths, resolve_sites
from conftest import TINY_SPEC, TinyDenoiser
from tiny import FAMILIES, sd15, sdxl


def test_find_spec_goes_by_base_class_never_by_name(dit):
    class MyDiT(DiTTransformer2DModel):
        pass

    class UNet2DConditionModelOfMine(nn.Module):
        pass

    UNet2DConditionModelOfMine.__name__ = "UNet2DConditionModel"
    dit.denoiser.__class__ = MyDiT
    assert find_spec(dit.denoiser) is SPECS["DiTTransformer2DModel"]
    with pytest.raises(TypeError, match=r"no DenoiserSpec .* known: .*DiTTransformer2DModel, .*UNet2DConditionModel.*Teacher"):
        find_spec(UNet2DConditionModelOfMine())


def test_find_spec_with_an_adapter_attached(dit):
    agd.attach(dit.denoiser, agd.AdapterConfig(hidden=2))
    assert find_spec(dit.denoiser) is dit.spec


@pytest.mark.parametrize("name", SPECS)
def test_spec_names_arguments_of_forward(name):
    spec, parameters = SPECS[name], inspect.signature(getattr(diffusers, name).forward).parameters
    arguments = [*(condition.argument for condition in spec.conditions), *spec.listed, *spec.repeated, *spec.batch_dims]
    arguments += [condition.mask for condition in spec.conditions if condition.mask]
    assert {argument.split(".")[0] for argument in (spec.sample, spec.timestep, *arguments)} <= set(parameters)


def test_dit_sites(dit):
    def paths(sites):
        return [(site.path, site.width, site.input_width) for site in resolve_sites(dit.denoiser, sites)]

    blocks = [f"transformer_blocks.{i}" for i in range(2)]
    assert paths(dit.spec.attention) == [(f"{block}.attn1", 16, 16) for block in blocks]
    assert paths(dit.spec.feed_forward) == [(f"{block}.ff", 16, 16) for block in blocks]
    found = paths(dit.spec.modulation)
    assert found[:2] == [(f"{block}.norm1.linear", 96, 16) for block in blocks]
    assert ("proj_out_1", 32, 16) in found


def test_unet_sites_are_every_attention_to_the_prompt_and_every_norm(unet):
    names = [name for name, _ in unet.denoiser.named_modules()]
    attention = [site.path for site in resolve_sites(unet.denoiser, unet.spec.attention)]
    assert attention == [name for name in names if name.endswith(".attn2")]
    assert len(attention) == 4
    norms = [n for n, module in unet.denoiser.named_modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    found = resolve_sites(unet.denoiser, unet.spec.modulation)
    assert [site.path for site in found] == norms
    for site in found:
        module = unet.denoiser.get_submodule(site.path)
        assert site.form == ("affine" if site.path == "conv_norm_out" else "scale")
        assert site.channel_dim == (1 if isinstance(module, nn.GroupNorm) else -1)


def test_resolve_sites_keeps_the_denoisers_order_and_names_each_once():
    sites = (agd.Site("blocks.1.*", width=12), agd.Site("blocks.*.modulation"), agd.Site("inner"))
    denoiser = TinyDenoiser()
    with pytest.raises(ValueError, match=r"width mismatch at 'blocks.1.modulation'"):
        resolve_sites(denoiser, sites)
    found = [site.path for site in resolve_sites(denoiser, (agd.Site("blocks.1.modulation"), *sites[1:]))]
    assert found == ["inner", "blocks.0.modulation", "blocks.1.modulation"]


def test_find_modules_names_the_nearest(dit):
    with pytest.raises(ValueError, match=r"DiTTransformer2DModel matches the path 'proj_out'; .*: proj_out_[12], proj_out_"):
        find_modules(dit.denoiser, "proj_out")
    with pytest.raises(ValueError, match=r"modules nearest to it: none"):
        find_modules(dit.denoiser, "qqqqqqqqqqqqq")


def test_module_widths(dit, unet):
    assert module_widths(nn.Linear(3, 5)) == (5, 3)
    assert module_widths(nn.LayerNorm((2, 7))) == (7, 7)
    assert module_widths(nn.GroupNorm(2, 6)) == (6, 6)
    assert module_widths(dit.denoiser.transformer_blocks[0].ff) == (16, 16)
    assert module_widths(unet.denoiser.mid_block.attentions[0].transformer_blocks[0].attn2) == (16, 16)
    assert module_widths(nn.Sequential()) == (None, None)


def test_layout_round_trips_through_json(backbone):
    layout = layout_for(backbone.denoiser, agd.AdapterConfig(), backbone.spec)
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def test_config_value(dit):
    assert config_value(dit.denoiser, "config.in_channels") == 2
    assert config_value(dit.denoiser, 7) == 7
    assert config_value(dit.denoiser, None) is None
    with pytest.raises(ValueError, match=r"names config.channels, but DiTTransformer2DModel has no such entry"):
        config_value(dit.denoiser, "config.channels")
    with pytest.raises(ValueError, match=r"names config.channels, but TinyDenoiser"):
        config_value(TinyDenoiser(), "config.channels")


def test_label_count_holds_the_null_label(dit, unet, tiny):
    assert label_count(dit.denoiser, dit.spec.conditions[0]) == 6
    assert label_count(tiny.denoiser, tiny.spec.conditions[0]) == 5
    assert label_count(unet.denoiser, unet.spec.conditions[0]) is None


def test_nest_reaches_into_dict_arguments():
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert nest({"x": a, "added.text": b, "added.ids": c}) == {"x": a, "added": {"text": b, "ids": c}}


def test_nest_makes_a_list_of_numbered_arguments_in_their_order():
    values = {f"rope.{i}": torch.full((1,), float(i)) for i in (0, 10, 2, 1, 9, 3, 4, 5, 6, 7, 8)}
    (found,) = nest(values).values()
    assert isinstance(found, list)  # as models append to it
    assert [int(value) for value in found] == list(range(11))


def test_a_batch_dim_stands_for_all_that_is_inside_of_an_argument():
    spec = agd.DenoiserSpec(batch_dims={"rotary": None, "layers.1": 1})
    names = ("rotary", "rotary.0", "rotary.0.2", "rotary_too", "layers", "layers.0", "layers.1", "layers.1.3")
    assert [spec.batch_dim(name) for name in names] == [None, None, None, 0, 0, 0, 1, 1]


def test_a_width_is_read_off_the_parameter_that_a_site_names_where_there_is_one():
    denoiser = FAMILIES["pixart"].pipeline().transformer
    found = resolve_sites(denoiser, (agd.Site("transformer_blocks.*", argument="timestep", width="scale_shift_table"),))
    assert [(site.path, site.width) for site in found] == [(f"transformer_blocks.{i}", 6 * 24) for i in range(2)]
    with pytest.raises(ValueError, match=r"expected a parameter 'table' at 'transformer_blocks.\?' to read a width off"):
        resolve_sites(denoiser, (agd.Site("transformer_blocks.?", argument="timestep", width="table"),))


def test_the_first_width_of_a_condition_that_is_set_counts():
    widths = {}
    for name, family in (("kolors", sdxl.SIBLINGS["kolors"]), ("sdxl", FAMILIES["sdxl"])):
        unet = family.pipeline().unet
        widths[name] = dict(layout_for(unet, agd.AdapterConfig("modulation"), find_spec(unet)).condition_widths)
    assert widths == {"kolors": {"encoder_hidden_states": 12}, "sdxl": {"encoder_hidden_states": 24}}


def test_a_width_is_read_out_of_a_list_in_the_config():
    unet = FAMILIES["audioldm2"].pipeline().unet
    widths = layout_for(unet, agd.AdapterConfig("modulation"), find_spec(unet)).condition_widths
    assert widths == {"encoder_hidden_states": 12, "encoder_hidden_states_1": 20}
    for index in ("0.3", "0.0", "2", "first"):
        with pytest.raises(ValueError, match=rf"the spec names config.cross_attention_dim.{index}, but .* no such entry"):
            config_value(unet, f"config.cross_attention_dim.{index}")


def test_a_variant_of_a_class_is_found_by_its_config(unet):
    spec = find_spec(FAMILIES["audioldm"].pipeline().unet)
    assert [condition.argument for condition in spec.conditions] == ["class_labels"]
    assert spec.modulation == unet.spec.modulation
    text = sd15.unet(class_embed_type="timestep", class_embeddings_concat=True)  # which MusicLDM sets too
    assert find_spec(text) is unet.spec
    assert not find_spec(FAMILIES["deepfloyd_if"].pipeline().unet).feed_forward
    assert find_spec(FAMILIES["sdxl"].pipeline().unet) is unet.spec  # whose addition_embed_type is another
    for name, variants in VARIANTS.items():
        assert {entry.partition("=")[0] for entry in variants} <= inspect.signature(getattr(diffusers, name)).parameters.keys()


def test_adapted_conditions_are_those_that_adapters_see(unet):
    assert [condition.argument for condition in unet.spec.adapted] == ["encoder_hidden_states"]
    assert len(TINY_SPEC.adapted) == 1


def test_a_time_embedding_that_does_not_run_on_t_is_named(tiny):
    spec = agd.DenoiserSpec(**{**vars(TINY_SPEC), "time_embedding": ("inner",)})
    with pytest.raises(ValueError, match=r"time_embedding \('inner',\) does not run on t .*sinusoidal"):
        agd.attach(tiny.denoiser, spec=spec)
