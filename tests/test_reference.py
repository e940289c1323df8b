"""Adapters of the paper's reference code: its own outputs, kept by bench/make_reference_fixtures.py, to 1e-5."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel

import agd_fast as agd
from agd_fast.adapters import AdapterConfig
from agd_fast.attaching import attachment_of, layout_for
from agd_fast.families import find_spec
from agd_fast.files import read_json, read_tensors
from agd_fast.reference import convert
from agd_fast.reference.convert import left_out
from agd_fast.spec import resolve_sites
from agd_fast.storage import CONFIG_NAME, WEIGHTS_NAME
from conftest import make_backbone, make_unet, trained

ASSETS = Path(__file__).parent / "assets" / "reference"
CASES = ("unet-attention", "unet-attention-prompt", "unet-additive", "dit-attention", "dit-additive", "dit-additive-omega")
STEP = "0005000.pt"
UP, DOWN = "up_blocks.0.attentions.0.transformer_blocks.1.attn2", "down_blocks.1.attentions.0.transformer_blocks.0.attn2"


def make_base(name):
    """The base of a case. DiT's has the frequencies of t and the ε of norms that facebook's model has."""
    if name.startswith("unet"):
        base = UNet2DConditionModel(**yaml.safe_load((ASSETS / "unet.yaml").read_text())).eval()
        base.load_state_dict(read_tensors(ASSETS / "unet.safetensors")[0])
        return base
    shape = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2, "sample_size": 4, "patch_size": 2}
    shape |= {"in_channels": 2, "out_channels": 4, "num_embeds_ada_norm": 5, "norm_num_groups": 2}
    base = DiTTransformer2DModel(**shape, norm_eps=1e-6).eval()
    lacking = base.load_state_dict(read_tensors(ASSETS / "dit.safetensors")[0], strict=False)
    assert not lacking.unexpected_keys and not [key for key in lacking.missing_keys if "pos_embed" not in key]
    for block in base.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return base


def calls_of(name):
    return read_tensors(ASSETS / name / "calls.safetensors")[0]


def run(base, calls):
    if "class_labels" in calls:
        return base(calls["sample"], timestep=calls["timestep"], class_labels=calls["class_labels"]).sample
    added = {name: calls[name] for name in ("text_embeds", "time_ids")}
    prompt = calls["encoder_hidden_states"]
    return base(calls["sample"], calls["timestep"], encoder_hidden_states=prompt, added_cond_kwargs=added).sample


def converted(name, base, output_dir, **options):
    return convert(ASSETS / name / STEP, config=ASSETS / name / "config.yaml", base=base, output_dir=output_dir, **options)


def config_of(name, **changes):
    return {**yaml.safe_load((ASSETS / name / "config.yaml").read_text()), **changes}


def assert_close(found, expected):
    assert (found - expected).abs().max() < 1e-5


@pytest.fixture
def unet():
    return make_base("unet")


@pytest.fixture
def checkpoint(tmp_path):
    """Write the checkpoint of a case after a change to its layers."""

    def write(name, change):
        content = torch.load(ASSETS / name / STEP, weights_only=True)
        change(content["model"])
        torch.save(content, tmp_path / "changed.pt")
        return tmp_path / "changed.pt"

    return write


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


def test_a_checkpoint_that_fills_all_layers_is_taken_too(unet, checkpoint, tmp_path):
    def fill(layers):
        for index in range(2):
            layers[f"up_blocks.0.attentions.1.transformer_blocks.{index}.attn2"] = layers[UP]

    path = checkpoint("unet-attention", fill)
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


# what is wrong, and what is said of it


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
def test_a_checkpoint_that_does_not_fit(case, change, message, checkpoint, tmp_path):
    base = make_base(case)
    with pytest.raises(ValueError, match=message):
        convert(checkpoint(case, change), config=config_of(case), base=base, output_dir=tmp_path / "new")
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


# AdapterConfig.layers, for any kind


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


def test_assets_hold_no_code():
    assert {path.suffix for path in ASSETS.rglob("*") if path.is_file()} == {".pt", ".yaml", ".safetensors"}
