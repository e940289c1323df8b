"""Adapters of the paper's reference code: its own outputs, kept by bench/make_reference_fixtures.py, to 1e-5."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

import agd_fast as agd
from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import attachment_of
from agd_fast.families import find_spec
from agd_fast.files import read_json, read_tensors
from agd_fast.reference import convert
from agd_fast.reference.convert import left_out
from agd_fast.sites import resolve_sites
from agd_fast.sources import CONFIG_NAME, WEIGHTS_NAME
from conftest import make_backbone, trained
from helpers_reference import ASSETS, STEP, UP, calls_of, changed, config_of, converted, make_base, run

CASES = ("unet-attention", "unet-attention-prompt", "unet-additive", "dit-attention", "dit-additive", "dit-additive-omega")


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-5


@pytest.fixture
def unet():
    return make_base("unet")


@pytest.mark.parametrize("name", CASES)
def test_convert_gives_the_outputs_of_the_reference(name, tmp_path):
    base, calls = make_base(name), calls_of(name)
    assert converted(name, base, tmp_path / "new", guidance_range=(1, 12)) == tmp_path / "new"
    with torch.no_grad():
        assert_close(run(base, calls), calls["base"])
        agd.load(base, tmp_path / "new")
        assert_close(run(base, calls), calls["base"])
        with agd.guided(base, calls["omega"]):
            assert_close(run(base, calls), calls["output"])
    assert (calls["output"] - calls["base"]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["unet-attention", "dit-additive"])
def test_a_converted_adapter_is_saved_and_loaded_like_any_other(name, tmp_path):
    base, calls = make_base(name), calls_of(name)
    agd.load(base, converted(name, base, tmp_path / "first", guidance_range=(1, 12)))
    agd.save(base, tmp_path / "second")
    agd.unload(base)
    first, second = (read_tensors(tmp_path / folder / WEIGHTS_NAME)[0] for folder in ("first", "second"))
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    agd.load(base, tmp_path / "second")
    with torch.no_grad(), agd.guided(base, calls["omega"]):
        assert_close(run(base, calls), calls["output"])


@pytest.mark.parametrize("name", ["unet-attention", "dit-attention"])
def test_convert_leaves_the_base_as_it_is(name, tmp_path):
    base, calls = make_base(name), calls_of(name)
    state = copy.deepcopy(base.state_dict())
    classes, hooks = [type(module) for module in base.modules()], [len(m._forward_hooks) for m in base.modules()]
    with torch.no_grad():
        before = run(base, calls)
        converted(name, base, tmp_path)
        assert torch.equal(run(base, calls), before)
    assert attachment_of(base) is None
    assert [type(module) for module in base.modules()] == classes
    assert [len(m._forward_hooks) for m in base.modules()] == hooks
    assert all(torch.equal(tensor, state[key]) for key, tensor in base.state_dict().items())


def test_convert_leaves_the_base_as_it_is_when_nothing_can_be_written(unet, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="could not write"):
        converted("unet-attention", unet, tmp_path / "taken")
    assert attachment_of(unet) is None


def test_convert_says_where_its_adapter_came_from(tmp_path):
    converted("dit-additive", make_base("dit"), tmp_path)
    config = read_json(tmp_path / CONFIG_NAME)
    about = config["about"]
    assert about["converted_from"] == "https://github.com/cristianpjensen/agd" and about["checkpoint"] == STEP
    assert about["reference_config"] == config_of("dit-additive")
    block = "transformer_blocks.0.norm1.emb"
    assert about["embedders"] == {
        "e_t": f"{block}.time_proj → {block}.timestep_embedder",
        "e_c": f"class_labels → {block}.class_embedder",
    }
    assert "block 0" in about["note"]
    assert config["adapter"]["kind"] == "reference_offset"
    assert config["adapter"]["layers"] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert config["adapter"]["guidance_range"] == [1.0, 6.0]


@pytest.mark.parametrize(("guidance_range", "expected"), [(None, (1.0, 12.0)), ((1.0, 8.0), (1.0, 8.0))])
def test_a_converted_adapter_warns_outside_the_range_it_was_trained_on(unet, tmp_path, guidance_range, expected):
    agd.load(unet, converted("unet-attention", unet, tmp_path, guidance_range=guidance_range))
    assert attachment_of(unet).adapter.config.guidance_range == expected
    with pytest.warns(UserWarning, match=r"lies outside"), agd.guided(unet, 13.0):
        pass


def test_an_adapter_sits_on_the_layers_that_the_reference_fills(unet, tmp_path):
    agd.load(unet, converted("unet-attention", unet, tmp_path))
    paths = [site.site.path for site in attachment_of(unet).adapter.sites]
    every = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
    assert paths == [name for name in every if not name.startswith("up_blocks.0.attentions.1.")]
    assert (len(paths), len(every)) == (6, 8)


def test_of_sdxls_70_layers_the_reference_fills_58():
    shape = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 2, 4), "transformer_layers_per_block": (1, 2, 10)}
    down, up = ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2), (*("CrossAttnUpBlock2D",) * 2, "UpBlock2D")
    with torch.device("meta"):
        sdxl = UNet2DConditionModel(**shape, down_block_types=down, up_block_types=up, cross_attention_dim=8)
    layers = [site.path for site in resolve_sites(sdxl, find_spec(sdxl).attention)]
    assert (len(layers), len([path for path in layers if not left_out(sdxl, path)])) == (70, 58)


def test_a_checkpoint_that_fills_all_layers_is_taken_too(unet, tmp_path):
    def fill(layers):
        for index in range(2):
            layers[f"up_blocks.0.attentions.1.transformer_blocks.{index}.attn2"] = layers[UP]

    path = changed("unet-attention", fill, tmp_path)
    agd.load(unet, convert(path, config=config_of("unet-attention"), base=unet, output_dir=tmp_path / "new"))
    assert len(list(attachment_of(unet).adapter.sites)) == 8


def test_convert_takes_a_teacher(tmp_path, unet):
    name = "unet-attention"
    null = {"encoder_hidden_states": torch.zeros(1, 5, 6), "added_cond_kwargs.text_embeds": torch.zeros(1, 3)}
    teacher = agd.Teacher(unet, DDIMScheduler(), null_condition=null, name="tiny-sdxl")
    converted(name, teacher, tmp_path)
    assert read_json(tmp_path / CONFIG_NAME)["about"]["base_model"] == "tiny-sdxl"
    agd.load(teacher, tmp_path)


def test_a_prompt_of_more_tokens_than_the_reference_has_positions_for(unet, tmp_path):
    agd.load(unet, converted("unet-attention", unet, tmp_path))
    calls = calls_of("unet-attention")
    calls["encoder_hidden_states"] = torch.randn(3, 300, 6)
    with torch.no_grad(), agd.guided(unet, calls["omega"]):
        assert run(unet, calls).isfinite().all()


def test_a_converted_adapter_has_no_shared_embedders(unet, tmp_path):
    agd.load(unet, converted("unet-attention", unet, tmp_path))
    assert not [name for name in attachment_of(unet).adapter.state_dict() if name.startswith("conditioning")]


@pytest.mark.parametrize("kind", ["reference_offset", "reference_cross_attention"])
@pytest.mark.parametrize("name", ["dit", "unet", "tiny"])
def test_a_fresh_reference_adapter_is_zero_and_learns(name, kind):
    backbone = make_backbone(name)
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
    config = AdapterConfig(kind, 4, omega_features="fourier", identity_at_one=False)
    adapter = agd.attach(backbone.denoiser, config, spec=backbone.spec)
    with agd.guided(backbone.denoiser, 3.0):
        assert torch.equal(backbone(**inputs), base)
        trained(adapter)
        backbone(**inputs).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_a_reference_part_acts_beside_another():
    backbone = make_backbone("dit")
    adapter = agd.attach(backbone.denoiser, AdapterConfig("modulation+reference_offset", 4))
    assert adapter.conditioning is not None
    inputs = backbone.inputs()
    with torch.no_grad():
        base = backbone(**inputs)
        trained(adapter)
        with agd.guided(backbone.denoiser, 1.0):
            assert torch.equal(backbone(**inputs), base)  # of both, identity_at_one


@pytest.mark.parametrize("kind", ["offset", "cross_attention", "reference_offset", "reference_cross_attention"])
@pytest.mark.parametrize("sees", [(), ("time",), ("conditions",), ("time", "conditions")])
def test_an_adapter_is_conditioned_on_what_sees_names(kind, sees):
    backbone = make_backbone("unet")
    adapter = trained(agd.attach(backbone.denoiser, AdapterConfig(kind, 4, sees=sees)))
    omega, time, text = torch.tensor([3.0]), torch.randn(1, 32), torch.randn(1, 5, 6)
    site, hidden = next(adapter.sites), torch.randn(1, 4, 16)

    def delta(time, text):
        with torch.no_grad():
            return site(hidden, torch.zeros_like(hidden), adapter.prepare(omega, time, {"encoder_hidden_states": text})[0])

    first = delta(time, text)
    assert torch.equal(delta(-time, text), first) == ("time" not in sees)
    assert torch.equal(delta(time, -text), first) == ("conditions" not in sees)


def test_assets_hold_no_code():
    assert {path.suffix for path in ASSETS.rglob("*") if path.is_file()} == {".pt", ".yaml", ".safetensors"}
