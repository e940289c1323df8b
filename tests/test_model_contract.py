"""What diffusers' own tests of its models check still holds for a denoiser that carries an inert adapter."""

import copy
import inspect
import json

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file

import agd_fast as agd
from conftest import assert_as_exact
from helpers_distillation import contents
from helpers_pipelines import CLASSES, MODELS, SCALE, attach, model


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def base(name):
    """Without an adapter."""
    return model(name)


@pytest.fixture
def this(name):
    found = model(name)
    attach(found.denoiser)
    return found


def assert_same(this, base, **arguments):
    with torch.no_grad():
        assert torch.equal(this(**arguments), base(**arguments))


# saving and loading


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_from_save_pretrained(name, this, base, variant, tmp_path):
    cls = CLASSES[name]
    with agd.guided(this.denoiser, SCALE):
        this.denoiser.save_pretrained(tmp_path / "ours", variant=variant)
    base.denoiser.save_pretrained(tmp_path / "base", variant=variant)
    assert contents(tmp_path / "ours") == contents(tmp_path / "base")
    found = cls.from_pretrained(tmp_path / "ours", variant=variant)
    assert type(found) is cls
    with torch.no_grad():
        assert torch.equal(this(denoiser=found), base())


def test_from_save_pretrained_in_shards_and_another_dtype(name, this, base, tmp_path):
    this.denoiser.save_pretrained(tmp_path, max_shard_size="8KB")
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(base.denoiser.state_dict())
    found = CLASSES[name].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(this(denoiser=found), base())
    low = CLASSES[name].from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16


def test_config_makes_the_same_denoiser(name, this, base, tmp_path):
    cls = CLASSES[name]
    this.denoiser.save_config(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    for config in (this.denoiser.config, cls.load_config(tmp_path)):
        found = cls.from_config(config)
        assert type(found) is cls
        assert list(found.state_dict()) == list(base.denoiser.state_dict())
    this.denoiser.register_to_config(note="kept")
    assert this.denoiser.config["note"] == "kept"


def test_state_dict_is_the_bases_and_loads(name, this, base):
    ours, theirs = this.denoiser.state_dict(), base.denoiser.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    zeros = {key: torch.zeros_like(value) for key, value in theirs.items()}
    this.denoiser.load_state_dict(zeros, strict=True)
    base.denoiser.load_state_dict(zeros, strict=True)
    assert_same(this, base)


# forward


def test_outputs_are_the_bases_and_determined(this, base):
    assert_same(this, base)
    with torch.no_grad():
        first, second = this(), this()
        assert torch.equal(first, second)
        assert torch.equal(this(SCALE), this(SCALE))
        assert this(SCALE).shape == first.shape == base().shape


def test_output_is_a_dict_or_a_tuple(this):
    with torch.no_grad():
        for scale in (None, SCALE):
            as_tuple = this(scale)
            if scale is None:
                as_dict = this.denoiser(**this.inputs)
            else:
                with agd.guided(this.denoiser, scale):
                    as_dict = this.denoiser(**this.inputs)
            assert torch.equal(as_dict.sample, as_tuple)
            assert torch.equal(as_dict[0], as_tuple)


def test_positional_arguments(this):
    names = list(inspect.signature(this.denoiser.forward).parameters)
    last = max(map(names.index, this.inputs))
    defaults = inspect.signature(this.denoiser.forward).parameters
    args = [this.inputs.get(name, defaults[name].default) for name in names[: last + 1]]
    with torch.no_grad():
        assert torch.equal(this.denoiser(*args, return_dict=False)[0], this())
        expected = this(SCALE)
        with agd.guided(this.denoiser, SCALE):
            assert torch.equal(this.denoiser(*args, return_dict=False)[0], expected)


def test_forward_signature_and_class(name, this, base):
    assert inspect.signature(this.denoiser.forward) == inspect.signature(base.denoiser.forward)
    assert isinstance(this.denoiser, CLASSES[name])
    assert type(this.denoiser) is not CLASSES[name]
    assert type(this.denoiser) in [CLASSES[name]]  # as `from_pipe` asks
    assert type(this.denoiser).__name__ == CLASSES[name].__name__
    assert repr(this.denoiser) == repr(base.denoiser)


def test_size_is_the_bases(this, base):
    assert this.denoiser.num_parameters() == base.denoiser.num_parameters()
    assert this.denoiser.num_parameters(only_trainable=True) == base.denoiser.num_parameters(only_trainable=True)
    assert this.denoiser.get_memory_footprint() == base.denoiser.get_memory_footprint()
    assert [key for key, _ in this.denoiser.named_modules()] == [key for key, _ in base.denoiser.named_modules()]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_dtype(this, base, dtype):
    for one in (this, base):
        one.denoiser.to(dtype)
        one.inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in one.inputs.items()}
    assert this.denoiser.dtype == dtype
    assert_same(this, base)
    with torch.no_grad():
        assert this(SCALE).dtype == dtype
        assert torch.isfinite(this(SCALE)).all()
    assert {parameter.dtype for parameter in this.attachment.adapter.parameters()} == {torch.float32}


# training the base


def step(this, checkpointing=False):
    this.denoiser.zero_grad()
    if checkpointing:
        this.denoiser.enable_gradient_checkpointing()
    else:
        this.denoiser.disable_gradient_checkpointing()
    this().square().mean().backward()
    return {key: parameter.grad for key, parameter in this.denoiser.named_parameters() if parameter.grad is not None}


def test_a_training_step_of_the_base_is_as_without_an_adapter(this, base):
    for one in (this, base):
        one.denoiser.train(not hasattr(one.denoiser, "transformer_blocks") or "class_labels" not in one.inputs)
    ours, theirs = step(this), step(base)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, theirs[key]), key
    assert all(parameter.grad is None for parameter in this.attachment.adapter.parameters())
    optimizers = [torch.optim.SGD(one.denoiser.parameters(), lr=0.01) for one in (this, base)]
    for optimizer in optimizers:
        optimizer.step()
    assert_same(this, base)


def test_effective_gradient_checkpointing(this):
    if "class_labels" not in this.inputs:
        this.denoiser.train()
    expected = {key: value.clone() for key, value in step(this).items()}
    found = step(this, checkpointing=True)
    assert this.denoiser.is_gradient_checkpointing
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def test_base_and_adapter_can_be_trained_together(this):
    with torch.enable_grad():
        this(SCALE).square().mean().backward()
    trained = [*this.denoiser.parameters(), *this.attachment.adapter.parameters()]
    assert all(torch.isfinite(parameter.grad).all() for parameter in trained if parameter.grad is not None)
    assert all(parameter.grad is not None for parameter in this.attachment.adapter.parameters())


def test_ema_model(name, this, base, tmp_path):
    cls = CLASSES[name]
    average = EMAModel(this.denoiser.parameters(), decay=0.5, model_cls=cls, model_config=this.denoiser.config)
    with torch.no_grad():
        for one in (this, base):
            for parameter in one.denoiser.parameters():
                parameter.mul_(1.5)
    average.step(this.denoiser.parameters())
    average.store(this.denoiser.parameters())
    average.copy_to(this.denoiser.parameters())
    expected = this()
    average.save_pretrained(tmp_path)
    found = EMAModel.from_pretrained(tmp_path, cls)
    average.restore(this.denoiser.parameters())
    assert_same(this, base)
    found.copy_to(base.denoiser.parameters())
    with torch.no_grad():
        assert torch.equal(base(), expected)
    assert sorted(load_file(tmp_path / "diffusion_pytorch_model.safetensors")) == sorted(base.denoiser.state_dict())


# attention processors, and what else is switched on a denoiser


def processor_of(name):
    return JointAttnProcessor2_0() if name == "sd3" else AttnProcessor()


@pytest.mark.parametrize("armed", [False, True])
@torch.no_grad()
def test_attention_processors(name, this, base, armed):
    if name == "dit":  # has no setter of its own: the processors lie on its blocks
        for one in (this, base):
            for block in one.denoiser.transformer_blocks:
                block.attn1.set_processor(AttnProcessor())
    else:
        assert list(this.denoiser.attn_processors) == list(base.denoiser.attn_processors)
        for one in (this, base):
            one.denoiser.set_attn_processor(processor_of(name))
    assert_same(this, base)
    if armed:
        plain = model(name)
        attach(plain.denoiser)
        exact = plain.exact()
        assert_as_exact(this(SCALE), plain(SCALE), exact(SCALE))


@torch.no_grad()
def test_default_attention_processors():
    this = model("unet")
    attach(this.denoiser)
    expected, guided = this(), this(SCALE)
    this.denoiser.set_attn_processor({key: AttnProcessor() for key in this.denoiser.attn_processors})
    this.denoiser.set_default_attn_processor()
    assert all(isinstance(one, (AttnProcessor, AttnProcessor2_0)) for one in this.denoiser.attn_processors.values())
    this.denoiser.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(this(), expected)
    assert torch.equal(this(SCALE), guided)


@pytest.mark.parametrize("name", ["unet", "sd3"])
@torch.no_grad()
def test_fused_qkv_projections(name, this, base):
    expected, exact = this(SCALE), this.exact()(SCALE)
    unfused = this()
    for one in (this, base):
        one.denoiser.fuse_qkv_projections()
    assert_same(this, base)
    assert_as_exact(this(SCALE), expected, exact)
    for one in (this, base):
        one.denoiser.unfuse_qkv_projections()
    assert torch.equal(this(), unfused)
    assert torch.equal(this(SCALE), expected)


@pytest.mark.parametrize(("chunk", "dim"), [(1, 0), (1, 1)])
@torch.no_grad()
def test_forward_chunking(chunk, dim):
    this, base = model("sd3"), model("sd3")
    attach(this.denoiser)
    expected, exact = this(SCALE), this.exact()(SCALE)
    for one in (this, base):
        one.denoiser.enable_forward_chunking(chunk, dim)
    assert_same(this, base)
    assert_as_exact(this(SCALE), expected, exact)
    this.denoiser.disable_forward_chunking()
    assert torch.equal(this(SCALE), expected)


@torch.no_grad()
def test_freeu_and_attention_slices():
    this, base = model("unet"), model("unet")
    attach(this.denoiser)
    guided, exact = this(SCALE), this.exact()(SCALE)
    for one in (this, base):
        one.denoiser.set_attention_slice("max")
    assert_same(this, base)
    assert_as_exact(this(SCALE), guided, exact)
    for one in (this, base):
        one.denoiser.set_default_attn_processor()
        one.denoiser.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert_same(this, base)
    assert not torch.equal(this(SCALE), this())
    this.denoiser.disable_freeu()
    assert_as_exact(this(SCALE), guided, exact)


@torch.no_grad()
def test_layerwise_casting(name):
    this, base = model(name), model(name)
    attach(this.denoiser)
    for one in (this, base):
        one.denoiser.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert_same(this, base)
    assert torch.isfinite(this(SCALE)).all()


def test_deepcopy_and_unload_leave_the_contract(name, this, base):
    other = copy.deepcopy(this.denoiser)
    agd.unload(other)
    assert type(other) is CLASSES[name]
    with torch.no_grad():
        assert torch.equal(this(denoiser=other), base())
