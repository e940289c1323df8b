"""Frozen weights as codes: what they are, what a linear and a convolution make of them, and that they come back."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.memory import MODES, frozen_backward
from agd_fast.memory.base_weights import PackedWeight, packed_base
from agd_fast.memory.weight_codes import NF4_BLOCK, NF4_LEVELS, pack_weight, unpack_weight
from conftest import make_dit, make_unet, trained

KINDS = ("int8", "nf4")
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}


def frozen_net(dtype=torch.float32):
    return (
        nn.Sequential(nn.Conv2d(8, 32, 3), nn.Flatten(2), nn.Linear(36, 96), nn.SiLU(), nn.Linear(96, 5))
        .requires_grad_(False)
        .to(dtype)
    )


@given(
    seed=st.integers(0, 99), rows=st.integers(1, 5), columns=st.sampled_from([1, 2, 31, 64, 100]), dtype=st.sampled_from(FLOATS)
)
def test_int8_is_half_a_step_off_at_most(seed, rows, columns, dtype):
    random = torch.Generator().manual_seed(seed)
    spread = 10 ** torch.empty(rows, 1).uniform_(-3, 2, generator=random)
    weight = (torch.randn(rows, columns, generator=random) * spread).to(dtype)
    codes, scales = pack_weight(weight, "int8")
    assert codes.dtype == torch.int8 and codes.abs().max() <= 127
    exact, steps = weight.double(), scales.double()
    assert (steps >= exact.abs().amax(1, keepdim=True) / 127 * (1 - 1e-6)).all()  # rounded up, never down
    assert ((codes.double() * steps - exact).abs() <= steps / 2 * (1 + 1e-6)).all()
    assert torch.equal(unpack_weight(codes, scales, "int8", weight.shape, torch.float32), codes.float() * scales.float())


@given(
    seed=st.integers(0, 99),
    shape=st.sampled_from([(1, 1), (3, 64), (2, 33), (5, 7), (4, 2, 3, 3)]),
    dtype=st.sampled_from(FLOATS),
)
def test_nf4_takes_the_nearest_level_of_a_block(seed, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, scales = pack_weight(weight, "nf4")
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    assert torch.equal(scales, blocks.abs().amax(1))
    levels = torch.tensor(NF4_LEVELS) * scales[:, None, None]  # [blocks, 1, 16]
    nearest = (blocks[..., None] - levels).abs().amin(-1)
    found = unpack_weight(codes, scales, "nf4", weight.shape, torch.float32)
    off = (F.pad(found.flatten(), (0, -weight.numel() % NF4_BLOCK)).view_as(blocks) - blocks).abs()
    assert (off <= nearest + 4 * torch.finfo(torch.float32).eps * scales[:, None]).all()
    assert codes.numel() == -(-weight.numel() // NF4_BLOCK) * NF4_BLOCK / 2


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_nan_stays_nan(kind):
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    weight[2, 7] = torch.nan
    found = unpack_weight(*pack_weight(weight, kind), kind, weight.shape, torch.float32)
    assert not found[0].any()
    assert found[1].isfinite().all() and found[1].all()
    assert found[2].isnan().all()  # never silently wrong


def test_nf4_is_what_its_authors_library_makes():
    """Codes and scales of bitsandbytes 0.50.2 for a ramp, so that a weight means the same in both."""
    codes, scales = pack_weight(torch.linspace(-2, 1, 64)[None], "nf4")
    assert scales.tolist() == [2.0]
    assert bytes(codes.tolist()).hex() == RAMP


RAMP = "000000011111111112222223333344444555566667778888999aaaabbbbccccc"


def outputs(layer, x, dtype=None):
    """y and the gradient of x for one upstream gradient."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


CASES = [
    ("linear", {}),
    *[
        (dimensions, settings)
        for dimensions, settings in product(
            (1, 2, 3),
            (
                {},
                {"stride": 2, "padding": 1},
                {"dilation": 2},
                {"groups": 2, "bias": False},
                {"padding": 1, "padding_mode": "circular"},
            ),
        )
    ],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layer", "settings"), CASES)
def test_a_product_is_that_of_the_unpacked_weight(layer, settings, dtype):
    """To the last bit, forward and backward: packing changes the weight alone."""
    if layer == "linear":
        module, x = nn.Linear(48, 40, **settings), torch.randn(2, 3, 48)
    else:
        module, x = CONVOLUTIONS[layer][0](16, 24, 4, **settings), torch.randn(2, 16, *[9] * layer)
    module, x = module.to(dtype).requires_grad_(False), x.to(dtype)
    plain = copy.deepcopy(module)
    for kind in KINDS:
        with packed_base(module, kind):
            assert isinstance(module.weight, PackedWeight)
            plain.weight = nn.Parameter(module.weight.unpacked(), requires_grad=False)
            for found, expected in zip(outputs(module, x), outputs(plain, x), strict=True):
                assert torch.equal(found, expected)
            with torch.no_grad():
                assert torch.equal(module(x), plain(x))
            if layer != "linear" and not settings:
                assert torch.equal(module(x[0]), plain(x[0]))  # without a batch


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_linear_computes_in_autocasts_dtype(kind):
    module, x = nn.Linear(64, 40).requires_grad_(False), torch.randn(3, 64)
    with packed_base(module, kind):
        low = module.weight.unpacked(torch.bfloat16)
        y, gradient = outputs(module, x, torch.bfloat16)
        assert y.dtype == torch.bfloat16 and gradient.dtype == torch.float32
        assert torch.equal(y, F.linear(x.bfloat16(), low, module.bias.bfloat16()))


def test_a_trained_bias_gets_its_gradient():
    for module, x in ((nn.Linear(48, 4), torch.randn(5, 48)), (nn.Conv2d(8, 4, 3), torch.randn(2, 8, 5, 5))):
        module.weight.requires_grad_(False)
        plain = copy.deepcopy(module)
        with packed_base(module, "int8"):
            module(x).square().sum().backward()
            plain.weight.data = module.weight.unpacked()
        plain(x).square().sum().backward()
        torch.testing.assert_close(module.bias.grad, plain.bias.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_unpacked_and_no_input_is_kept_for_backward(kind):
    net, kept = frozen_net(), []
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    with packed_base(net, kind), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        net(x).sum().backward()
        weights = [net[index].weight for index in (0, 2, 4)]
        parts = [part for weight in weights for part in (weight.codes, weight.scales)]
    of_silu = [t for t in kept if t.shape == (2, 32, 96)]
    assert len(of_silu) == 1
    assert len(kept) == len(parts) + len(of_silu)
    assert {part.data_ptr() for part in parts} == {t.data_ptr() for t in kept if t is not of_silu[0]}
    sizes = sum(part.nbytes for part in parts) / sum(weight.numel() for weight in weights)
    assert sizes < {"int8": 1.05, "nf4": 0.85}[kind]  # bytes a weight; nf4's convolution is int8


def test_convolutions_are_never_nf4():
    net = frozen_net()
    with packed_base(net, "nf4"):
        assert [net[index].weight.kind for index in (0, 2, 4)] == ["int8", "nf4", "nf4"]


def bits(module):
    return {name: (id(p), p.device, p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()}


def assert_same(found, expected):
    for name, (identity, device, flag, value) in expected.items():
        assert found[name][:3] == (identity, device, flag), name
        assert torch.equal(found[name][3], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_come_back_as_the_same_parameters_bit_for_bit(kind):
    net = frozen_net(torch.bfloat16)
    net[4].weight[0, 0] = torch.nan  # whatever it holds
    net.append(nn.Linear(5, 96, bias=False)).append(nn.Linear(96, 5, bias=False).requires_grad_(False))
    net[-1].weight = net[4].weight  # tied
    before, keys = bits(net), list(net.state_dict())
    with packed_base(net, kind) as base:
        assert net[-1].weight is net[4].weight
        assert isinstance(net[4].weight, PackedWeight) and type(net[5].weight) is nn.Parameter  # trained: left alone
        assert list(net.state_dict()) == keys
        with base.restored():
            assert torch.equal(net[2].weight, before["2.weight"][3])
        assert isinstance(net[4].weight, PackedWeight)
    after = bits(net)
    after["4.weight"][3][0, 0] = before["4.weight"][3][0, 0] = 0
    assert_same(after, before)


def test_an_error_inside_or_while_packing_gives_the_weights_back(monkeypatch):
    import agd_fast.memory.base_weights as room

    net = frozen_net()
    before = bits(net)
    with pytest.raises(KeyboardInterrupt), packed_base(net, "int8"):
        raise KeyboardInterrupt
    assert_same(bits(net), before)
    calls = []

    def fail(weight, kind):
        calls.append(kind)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return pack_weight(weight, kind)

    monkeypatch.setattr(room, "pack_weight", fail)
    with pytest.raises(torch.OutOfMemoryError), packed_base(net, "int8"):
        pass
    assert len(calls) == 2
    assert_same(bits(net), before)


def test_a_device_that_is_full_by_then_leaves_the_weights_right(monkeypatch):
    net = frozen_net()
    before, to = bits(net), torch.Tensor.to

    def full(tensor, *args, **kwargs):
        if args == (torch.device("cpu"),) and tensor.shape == (96, 36):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to(tensor, *args, **kwargs)

    with packed_base(net, "int8") as base:
        packed = net[2].weight
        monkeypatch.setattr(torch.Tensor, "to", full)
        with pytest.warns(UserWarning, match=r"cpu has no room .* in host memory: CUDA out of memory."):
            base.restore()
        monkeypatch.undo()
        assert net[2].weight is not packed
    assert_same(bits(net), before)


def test_what_is_not_frozen_not_plain_or_too_narrow_is_left_alone():
    net = nn.ModuleList(
        [
            nn.Linear(31, 9),
            nn.Linear(32, 9),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.Embedding(40, 40),
            nn.LayerNorm(40),
            nn.Linear(64, 8),
        ]
    ).requires_grad_(False)
    net[5].weight.requires_grad_(True)
    with packed_base(net, "int8"):
        assert [isinstance(module.weight, PackedWeight) for module in net] == [False, True, False, False, False, False]
    with (
        pytest.raises(ValueError, match="frozen linears or convolutions.*found none in this ModuleList"),
        packed_base(net[:1], "int8"),
    ):
        pass
    with pytest.raises(ValueError, match="one of .*int8.*nf4.*or None, found 'int4'"), packed_base(net, "int4"):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_write_to_codes_is_refused(kind):
    net = frozen_net()
    with packed_base(net, kind), torch.no_grad():
        weight, ones = net[2].weight, torch.ones(96, 36)
        for write in (
            lambda: weight.add_(1),
            lambda: weight.data.copy_(ones),
            lambda: torch._foreach_mul_([ones, weight], 2),
            lambda: torch.add(ones, 1, out=weight),
        ):
            with pytest.raises(RuntimeError, match=f"kept as {kind}"):
                write()
        assert torch.equal(torch.mul(weight, 2, out=ones), 2 * weight.unpacked())


def test_a_packed_weight_is_its_tensor_to_everything_else():
    layer = nn.Linear(64, 48).bfloat16().requires_grad_(False)
    with packed_base(layer, "int8"):
        weight = layer.weight
        assert (weight.shape, weight.dtype, weight.device.type, weight.requires_grad) == ((48, 64), torch.bfloat16, "cpu", False)
        assert sum(p.numel() for p in layer.parameters()) == 48 * 65
        plain = weight.unpacked()
        assert torch.equal(torch.ones(2, 48).bfloat16() @ weight, torch.ones(2, 48).bfloat16() @ plain)
        assert torch.equal(weight.float(), unpack_weight(weight.codes, weight.scales, "int8", weight.shape, torch.float32))
        layer.to(torch.float32)
        assert isinstance(layer.weight, PackedWeight) and layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight.unpacked().bfloat16(), plain)
        other = copy.deepcopy(layer)
        assert torch.equal(other.weight.unpacked(), layer.weight.unpacked())
        assert other.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
        layer.to(torch.bfloat16)


def gradients(denoiser, inputs, dtype=None):
    """Of a trained adapter for a fixed upstream gradient: one vector, and the prediction."""
    adapter = attachment_of(denoiser).adapter
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None), agd.guided(denoiser, 4.0):
        y = denoiser(**inputs, return_dict=False)[0]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((y.float() * dy).sum(), list(adapter.parameters()))
    return torch.cat([g.flatten() for g in found]), y.detach().float()


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


def weight_error(denoiser, kind):
    """Of all packed weights together, relative."""
    before = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    with packed_base(denoiser, kind):
        packed = {name: p.unpacked() for name, p in denoiser.named_parameters() if isinstance(p, PackedWeight)}
    return off(*(torch.cat([values[name].flatten() for name in packed]) for values in (packed, before)))


@pytest.mark.parametrize("make", ["dit", "unet"])
def test_gradients_of_an_adapter_over_packed_weights(make):
    """int8 loses less than twice what bfloat16 autocast does, which is accepted everywhere. NF4 loses as much more as its weights
    are further off: errors this small add up linearly, so that twice that is a bar."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 4, 4)
    if make == "dit":
        denoiser, inputs = make_dit(attention_head_dim=16), {"hidden_states": x, "class_labels": torch.tensor([1, 3])}
    else:
        denoiser, inputs = make_unet(cross_attention_dim=32), {"sample": x, "encoder_hidden_states": torch.randn(2, 5, 32)}
    inputs["timestep"] = torch.tensor([900, 20])
    denoiser.requires_grad_(False)
    trained(agd.attach(denoiser, agd.AdapterConfig(hidden=4)))
    exact, low = gradients(denoiser, inputs), gradients(denoiser, inputs, torch.bfloat16)
    lost = [off(found, expected) for found, expected in zip(low, exact, strict=True)]
    errors = {}
    for kind in KINDS:
        with packed_base(denoiser, kind):
            errors[kind] = [off(found, expected) for found, expected in zip(gradients(denoiser, inputs), exact, strict=True)]
    further = weight_error(denoiser, "nf4") / weight_error(denoiser, "int8")
    for fine, rough, bar in zip(errors["int8"], errors["nf4"], lost, strict=True):
        assert 0 < fine < 2 * bar
        assert fine < rough < 2 * further * fine
    assert torch.equal(gradients(denoiser, inputs)[0], exact[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["exact", "4bit", "recompute"])
def test_packed_weights_and_packed_activations_go_together(mode, kind):
    """What is kept has no weight in it that was unpacked, and the gradient is as far off as over plain weights."""
    torch.manual_seed(0)
    denoiser = make_dit(attention_head_dim=16).requires_grad_(False)
    inputs = {"hidden_states": torch.randn(2, 2, 4, 4), "class_labels": torch.tensor([1, 3]), "timestep": torch.tensor([900, 20])}
    trained(agd.attach(denoiser, agd.AdapterConfig(hidden=4)))
    every, errors = replace(MODES[mode], smallest=0), []
    shapes = {(32, 32), (128, 32), (32, 128)}  # of linears and, in autograd's hands, of their transposes
    for packed in (False, True):
        with packed_base(denoiser, kind) if packed else nullcontext():
            expected, _ = gradients(denoiser, inputs)
            with frozen_backward(denoiser, activations=every):
                gradients(denoiser, inputs)  # in which it is planned what is kept
                kept = []
                with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t):
                    found, _ = gradients(denoiser, inputs)
        errors.append(off(found, expected))
        wide = [t for t in kept if t.is_floating_point() and not isinstance(t, PackedWeight) and t.shape in shapes]
        assert bool(wide) != packed
    assert errors[1] < 2 * errors[0] + torch.finfo(torch.float32).eps * 64
