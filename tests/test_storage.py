"""agd_fast.save and agd_fast.load."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.files import read_json, read_tensors, write_json, write_tensors
from agd_fast.sources import CONFIG_NAME, WEIGHTS_NAME
from helpers_distillation import NET_SPEC, Net, assert_same_tensors, contents, custom_teacher, small, tiny_teacher, unet

KINDS = ("modulation", "gated_lora", "cross_attention", "offset", "modulation+cross_attention")


def attach_random(teacher, config):
    """An adapter that is not zero, as after training."""
    adapter = agd.attach(teacher, config)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapter


def predict(teacher, omega=3.0):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(4, *teacher.sample_shape, generator=generator), torch.tensor([10, 400, 700, 999])
    with agd.guided(teacher, omega), torch.no_grad():
        return teacher.predict(x, t, teacher.conditions([0, 1, 2, 2]))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    teacher = tiny_teacher()
    attach_random(teacher, small())
    return agd.save(teacher, tmp_path_factory.mktemp("adapter"), about={"note": "for the tests"})


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copied")


@pytest.fixture
def untouched():
    """A teacher that must come out of the test as it went in."""
    teacher = tiny_teacher()
    before = {name: value.clone() for name, value in teacher.denoiser.state_dict().items()}
    modules, hooks = dict(teacher.denoiser.named_modules()), len(teacher.denoiser._forward_hooks)
    yield teacher
    assert attachment_of(teacher) is None
    assert_same_tensors(teacher.denoiser.state_dict(), before)
    assert dict(teacher.denoiser.named_modules()) == modules
    assert len(teacher.denoiser._forward_hooks) == hooks
    assert [name for name, module in modules.items() if type(module).__dict__.get("_agd_base")] == []


@pytest.mark.parametrize("features", ["smooth", "fourier"])
@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_back_what_save_wrote(tmp_path, kind, features):
    teacher = tiny_teacher()
    adapter = attach_random(teacher, small(kind=kind, omega_features=features, guidance_range=(1, 9)))
    agd.save(teacher, tmp_path)
    expected, config = predict(teacher), adapter.config
    state = {name: value.clone() for name, value in adapter.state_dict().items()}
    agd.unload(teacher)
    before = torch.get_rng_state()
    assert agd.load(teacher, tmp_path) is teacher
    assert torch.equal(torch.get_rng_state(), before)
    loaded = attachment_of(teacher).adapter
    assert loaded.config == config
    assert_same_tensors(loaded.state_dict(), state)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(predict(teacher), expected)


def test_load_for_a_custom_denoiser(tmp_path):
    teacher = custom_teacher()
    attach_random(teacher, small())
    agd.save(teacher, tmp_path)
    expected = predict(teacher)
    assert torch.equal(predict(agd.load(custom_teacher(), tmp_path)), expected)
    bare = Net()
    with pytest.raises(TypeError, match="no DenoiserSpec is known for Net"):
        agd.load(bare, tmp_path)
    agd.load(bare, tmp_path, spec=NET_SPEC)
    assert attachment_of(bare) is not None


def test_load_leaves_the_adapter_inert(saved):
    teacher, base = tiny_teacher(), tiny_teacher()
    agd.load(teacher, saved)
    x, t, table = torch.randn(2, 1, 4, 4), torch.tensor([3, 900]), {"class_labels": torch.tensor([0, 2])}
    with torch.no_grad():
        assert torch.equal(teacher.predict(x, t, table), base.predict(x, t, table))


def test_load_refuses_a_second_adapter(saved):
    teacher = agd.load(tiny_teacher(), saved)
    with pytest.raises(ValueError, match="already has an adapter"):
        agd.load(teacher, saved)


def test_save_writes_a_config_for_readers(saved):
    config = read_json(saved / CONFIG_NAME)
    assert config["format_version"] == 1
    assert config["library_version"] == agd.__version__
    assert config["base_class"] == "DiTTransformer2DModel"
    assert config["omega_offset"] == 0.0
    assert config["adapter"]["kind"] == "modulation"
    assert config["adapter"]["guidance_range"] == [1.0, 6.0]
    assert "transformer_blocks.0.norm1.linear" in [site["path"] for site in config["layout"]["sites"]["modulation"]]
    assert config["prediction_type"] == "v_prediction"
    assert config["about"] == {"base_model": "tiny", "note": "for the tests"}


def test_save_writes_no_pickle(saved, monkeypatch):
    assert sorted(contents(saved)) == [WEIGHTS_NAME, CONFIG_NAME]
    with safe_open(saved / WEIGHTS_NAME, framework="pt") as file:
        assert len(file.keys()) == len(attachment_of(agd.load(tiny_teacher(), saved)).adapter.state_dict())
    monkeypatch.setattr(torch, "load", lambda *_: pytest.fail("torch.load was called"))
    agd.load(tiny_teacher(), saved)


def test_save_takes_keys_that_json_turns_into_text(tmp_path):
    teacher = tiny_teacher()
    agd.attach(teacher, small())
    agd.save(teacher, tmp_path, about={"explained": {10.0: 0.5, 9.0: 0.5}, "range": (1, 2)})
    agd.load(tiny_teacher(), tmp_path)


def test_save_refuses_what_json_cannot_hold_and_keeps_the_old_adapter(copied):
    teacher, before = tiny_teacher(), contents(copied)
    attach_random(teacher, small())
    with pytest.raises(TypeError, match="not JSON serializable"):
        agd.save(teacher, copied, about={"tensor": torch.zeros(1)})
    assert contents(copied) == before


def test_save_without_adapter(tmp_path):
    with pytest.raises(ValueError, match="no adapter is attached"):
        agd.save(tiny_teacher(), tmp_path / "new")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: agd.Teacher(unet(), tiny_teacher().scheduler), "an adapter for a DiT.* for this UNet"),
        (
            lambda: tiny_teacher(width=32),
            r"width mismatch at 'transformer_blocks.0.norm1.*16 → 96 channels, this base 32 → 192",
        ),
        (
            lambda: tiny_teacher(layers=2),
            r"this base has \d: not in the base none, not in the adapter \['transformer_blocks.1",
        ),
    ],
)
def test_load_refuses_an_adapter_for_another_base(saved, other, message):
    teacher = other()
    with pytest.raises(ValueError, match=message):
        agd.load(teacher, saved)
    assert attachment_of(teacher) is None


def test_load_refuses_an_adapter_for_fewer_layers(tmp_path, untouched):
    deeper = tiny_teacher(layers=2)
    agd.attach(deeper, small())
    agd.save(deeper, tmp_path)
    with pytest.raises(ValueError, match=r"not in the base \['transformer_blocks.1.*not in the adapter none"):
        agd.load(untouched, tmp_path)


def test_load_refuses_an_adapter_for_another_embedding_width(tmp_path):
    agd.attach(model := unet(8), small(kind="offset"))
    agd.save(model, tmp_path)
    other = unet(12)
    with pytest.raises(ValueError, match=r"'encoder_hidden_states': 8.*this base has .*'encoder_hidden_states': 12"):
        agd.load(other, tmp_path)
    assert attachment_of(other) is None


def edit(directory, **changes):
    write_json(directory / CONFIG_NAME, {**read_json(directory / CONFIG_NAME), **changes})


def cut(directory):
    path = directory / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-7])


def reshape(directory):
    tensors, metadata = read_tensors(directory / WEIGHTS_NAME)
    name = sorted(tensors)[0]
    write_tensors(directory / WEIGHTS_NAME, {**tensors, name: torch.zeros(2, 2, 2)}, metadata)


def drop(directory):
    tensors, metadata = read_tensors(directory / WEIGHTS_NAME)
    name = sorted(tensors)[0]
    write_tensors(directory / WEIGHTS_NAME, {key: value for key, value in tensors.items() if key != name}, metadata)


def flip(directory):
    path = directory / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def convert(directory, change):
    tensors, metadata = read_tensors(directory / WEIGHTS_NAME)
    write_tensors(directory / WEIGHTS_NAME, {name: change(value) for name, value in tensors.items()}, metadata)


def drop_entry(directory, name):
    config = read_json(directory / CONFIG_NAME)
    del config[name]
    write_json(directory / CONFIG_NAME, config)


def spoil(directory, part, name):
    config = read_json(directory / CONFIG_NAME)
    config[part].pop(name)
    write_json(directory / CONFIG_NAME, config)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut, ValueError, "adapter.safetensors is truncated or not a safetensors file"),
        (
            lambda d: (d / WEIGHTS_NAME).write_bytes(b"\x80\x04pickle"),
            ValueError,
            "truncated or not a safetensors file",
        ),
        (lambda d: (d / WEIGHTS_NAME).unlink(), FileNotFoundError, "expected a safetensors file at .*adapter"),
        (
            lambda d: (d / CONFIG_NAME).unlink(),
            FileNotFoundError,
            r"expected adapter_config.json .*found \['adapter.saf",
        ),
        (shutil.rmtree, FileNotFoundError, "expected adapter_config.json and adapter.* no such dir"),
        (lambda d: (d / CONFIG_NAME).write_text("{"), ValueError, "adapter_config.json is not valid JSON"),
        (lambda d: (d / CONFIG_NAME).write_text("[1]"), ValueError, "expected a format_version, found None"),
        (lambda d: edit(d, format_version=2), ValueError, r"has format_version 2, this agd_fast .* reads up to 1"),
        (lambda d: edit(d, about={"other": "run"}), ValueError, "adapter_config.json do not belong"),
        (lambda d: drop_entry(d, "layout"), ValueError, r"adapter_config.json lacks the entries \['layout'\]"),
        (lambda d: spoil(d, "layout", "time_width"), ValueError, "does not describe an adapter.*time_width"),
        (lambda d: spoil(d, "adapter", "kind"), ValueError, r"does not describe an adapter.*missing \['kind'\]"),
        (lambda d: edit(d, adapter={"kind": 3}), ValueError, "does not describe an adapter"),
        (reshape, ValueError, r"first 'conditioning.*expected \(.*found \(2, 2, 2\)"),
        (drop, ValueError, r"in 1 tensors, first 'conditioning.*found none"),
        (flip, ValueError, "adapter.safetensors is damaged: expected a content with the hash"),
        (lambda d: convert(d, torch.Tensor.int), ValueError, r"no weights in 'cond.*of floating point, found torch.int32"),
        (lambda d: convert(d, lambda w: w / 0), ValueError, r"no weights in 'cond.*finite numbers .*, found values that are not"),
    ],
)
def test_load_names_what_is_wrong_and_leaves_the_model(copied, untouched, damage, error, message):
    damage(copied)
    with pytest.raises(error, match=message) as raised:
        agd.load(untouched, copied)
    assert str(copied) in str(raised.value)


def test_load_takes_weights_without_a_hash_of_them(copied, saved):
    """As older versions wrote them."""
    convert(copied, torch.clone)
    assert (copied / WEIGHTS_NAME).read_bytes() != (saved / WEIGHTS_NAME).read_bytes()
    loaded = attachment_of(agd.load(tiny_teacher(), copied)).adapter.state_dict()
    assert_same_tensors(loaded, read_tensors(saved / WEIGHTS_NAME)[0])


def test_load_refuses_weights_of_another_config(copied, tmp_path, untouched):
    other = tiny_teacher()
    agd.attach(other, small(hidden=3))
    agd.save(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / WEIGHTS_NAME, copied)
    with pytest.raises(ValueError, match="do not belong together"):
        agd.load(untouched, copied)


def test_save_twice_gives_the_same_bytes(saved, tmp_path):
    teacher = agd.load(tiny_teacher(), saved)
    agd.save(teacher, tmp_path, about=json.loads((saved / CONFIG_NAME).read_text())["about"])
    assert contents(tmp_path) == contents(saved)


@pytest.mark.parametrize(("entry", "value"), [("prediction_type", "epsilon"), ("omega_offset", 1.0)])
def test_load_of_an_adapter_for_another_prediction_is_an_error(saved, entry, value):
    """Its shapes fit; its numbers would not."""
    teacher = tiny_teacher()
    if entry == "prediction_type":
        teacher.scheduler.register_to_config(prediction_type=value)
    else:
        teacher.spec = dataclasses.replace(teacher.spec, omega_offset=value)
    with pytest.raises(ValueError, match=f"{entry}=.*expected {value!r}"):
        agd.load(teacher, saved)
    assert attachment_of(teacher) is None
