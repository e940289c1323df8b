"""Checkpoints and configs of the reference code that cannot be converted: what is said of them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

import agd_fast as agd
from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import attachment_of
from agd_fast.families import find_spec
from agd_fast.reference import convert
from conftest import make_unet
from helpers_reference import ASSETS, DOWN, STEP, UP, changed, config_of, converted, make_base


@pytest.fixture
def unet():
    return make_base("unet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "mlp_gate"}, "arch='mlp_gate', which is not supported; expected one of 'additive', 'attention'"),
        ({"arch": "lora"}, "arch='lora', which is unknown; expected one of 'additive', 'attention'"),
        (
            {"base_model": "stabilityai/stable-diffusion-3-medium-diffusers"},
            "cannot run Stable Diffusion 3; expected .* 2.1 or XL",
        ),
        ({"hidden_dim": None}, "must have hidden_dim as int; found None"),
        ({"use_prompt": 1}, "must have use_prompt as bool; found 1"),
    ],
)
def test_a_config_without_a_counterpart(unet, tmp_path, changes, message):
    config = config_of("unet-attention", **changes)
    with pytest.raises(ValueError, match=message):
        convert(ASSETS / "unet-attention" / STEP, config=config, base=unet, output_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_config_that_lacks_entries(unet, tmp_path):
    def attempt(config):
        convert(ASSETS / "dit-additive" / STEP, config=config, base=unet, output_dir=tmp_path)

    with pytest.raises(ValueError, match=r"must have base_model \(a UNet\) or image_size \(DiT\); found the entries \['arch'\]"):
        attempt({"arch": "additive"})
    config = config_of("dit-additive")
    del config["cfg_mult"]
    with pytest.raises(ValueError, match="must have cfg_mult as number; found 'none'"):
        attempt(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a list", "expected a mapping, found a list"),
        ("a: [", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML without Python objects"),
    ],
)
def test_a_config_file_that_is_none(unet, tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.yaml.*{message}"):
        convert(ASSETS / "unet-attention" / STEP, config=tmp_path / "config.yaml", base=unet, output_dir=tmp_path)


def test_files_that_are_missing(unet, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(tmp_path / "nowhere.pt", config=config_of("unet-attention"), base=unet, output_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert(ASSETS / "unet-attention" / STEP, config=tmp_path / "nowhere.yaml", base=unet, output_dir=tmp_path)


def test_a_checkpoint_for_another_kind_of_base(unet, tmp_path):
    with pytest.raises(ValueError, match="adapter for a DiTTransformer2DModel, expected one for this UNet2DConditionModel"):
        converted("dit-additive", unet, tmp_path)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {UP: {"q_proj.weight": Evil()}}}, "cannot be read as tensors alone; expected .*{'model': {layer"),
        ({"ema": {}}, r"found entries \['ema'\]"),
        ([torch.zeros(1)], "found a list"),
        ({"model": {UP: torch.zeros(1)}}, rf"found under '{UP}' a Tensor"),
        ({"model": {UP: {"q_proj": {"weight": 1}}}}, rf"found under '{UP}' entries \['q_proj'\]"),
    ],
)
def test_a_checkpoint_that_is_none(unet, tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "other.pt")
    with pytest.raises(ValueError, match=message):
        convert("other.pt", config=config_of("unet-attention"), base=unet, output_dir="new")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\x80\x02q\x01", b"PK", None])
def test_a_checkpoint_that_is_broken(unet, tmp_path, content):
    path = tmp_path / "half.pt"
    path.write_bytes((ASSETS / "unet-attention" / STEP).read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=r"half\.pt cannot be read as tensors alone"):
        convert(path, config=config_of("unet-attention"), base=unet, output_dir=tmp_path)


def drop(layer, name=None):
    return lambda layers: layers.pop(layer) if name is None else layers[layer].pop(name)


def put(layer, name, tensor):
    return lambda layers: layers.setdefault(layer, {}).update({name: tensor})


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("unet-attention", drop(DOWN), rf"at 5 layers, expected the 6 .* missing \['{DOWN}'\], not in the base none"),
        ("unet-attention", put("up.attn2", "x", torch.ones(1)), r"at 7 layers, expected the 6 .* not in the base \['up.attn2'\]"),
        ("dit-additive", drop("blocks.1.attn"), r"at 1 layers, expected the 2 .* missing \['transformer_blocks.1.attn1'\]"),
        ("unet-attention", drop(UP, "k_proj.weight"), rf"{UP} does not hold .* missing \['k_proj.weight'\], unknown none"),
        ("unet-attention", put(UP, "q_proj.bias", torch.ones(4)), r"missing none, unknown \['q_proj.bias'\]"),
        ("unet-attention", put(UP, "q_proj.weight", torch.ones(4, 9)), rf"at {UP}.q_proj.weight: .* \[4, 8\], .* has \[4, 9\]"),
        ("unet-additive", put(UP, "out_proj.net.4.bias", torch.ones(9)), r"out_proj.net.4.bias: .* \[8\], .* has \[9\]"),
        ("unet-attention", put(UP, "pos_enc.pe", torch.ones(9, 4)), r"pos_enc.pe: .* \[250, 4\], .* has \[9, 4\]"),
        ("unet-attention", put(UP, "pos_enc.pe", torch.ones(250, 4)), r"sines and cosines .* found others: they differ by 2"),
    ],
)
def test_a_checkpoint_that_does_not_fit(case, change, message, tmp_path):
    base = make_base(case)
    with pytest.raises(ValueError, match=message):
        convert(changed(case, change, tmp_path), config=config_of(case), base=base, output_dir=tmp_path / "new")
    assert attachment_of(base) is None and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_timestep": False}, r"use_timestep=False.*unknown \['timestep_proj.bias', 'timestep_proj.weight'\]"),
        ({"use_prompt": False}, r"the prompt used: False.*unknown \['prompt_proj.bias', 'prompt_proj.weight'\]"),
        ({"arch": "additive"}, r"arch='additive'.*missing \['guidance_scale_embedder.net.1.net.3.bias'"),
        ({"hidden_dim": 8}, r"hidden_dim=8\) and the base ask for \[8\], the checkpoint has \[4\]"),
    ],
)
def test_a_checkpoint_and_a_config_that_do_not_belong_together(unet, tmp_path, changes, message):
    config = config_of("unet-attention", **changes)
    with pytest.raises(ValueError, match=message):
        convert(ASSETS / "unet-attention" / STEP, config=config, base=unet, output_dir=tmp_path)


def test_a_base_of_other_widths(tmp_path):
    base = make_unet(transformer_layers_per_block=(1, 2), cross_attention_dim=6)
    with pytest.raises(ValueError, match=r"width mismatch at .* and the base ask for \[4, 16\], the checkpoint has \[4, 8\]"):
        converted("unet-attention", base, tmp_path)


def test_a_teacher_whose_spec_lets_adapters_see_more(unet, tmp_path):
    spec = find_spec(unet)
    more = replace(spec, conditions=tuple(replace(condition, adapt=True) for condition in spec.conditions[:2]))
    with pytest.raises(ValueError, match=r"see one condition, the prompt; .* see \['encoder_hidden_states', 'class_labels'\]"):
        converted("unet-attention", agd.Teacher(unet, DDIMScheduler(), more), tmp_path)


def test_a_base_with_an_adapter_keeps_it(unet, tmp_path):
    adapter = agd.attach(unet, AdapterConfig("offset", 4))
    with pytest.raises(ValueError, match="already has an adapter"):
        converted("unet-attention", unet, tmp_path)
    assert attachment_of(unet).adapter is adapter


def test_a_converted_adapter_does_not_load_on_a_base_that_lacks_its_layers(unet, tmp_path):
    converted("unet-attention", unet, tmp_path)
    with pytest.raises(ValueError, match=r"no module of UNet2DConditionModel matches the path 'down_blocks.1"):
        agd.load(make_unet(), tmp_path)
