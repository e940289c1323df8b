"""agd_fast.memory.handlers: every function that is handled gives what it gave, and the same gradients from what is kept."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from agd_fast.memory import MODES
from helpers_handlers import frozen, run, wanted
from helpers_memory import nodes, tensors_in


def rms(x):
    """Written out, as diffusers does."""
    return x * torch.rsqrt(x.to(torch.float64).pow(2).mean(-1, keepdim=True) + 1e-6)


def rotary(x, cos, sin):
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x.double() * cos + torch.stack([-imaginary, real], dim=-1).flatten(-2) * sin


def turned(x, angles):
    """The same in complex numbers."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2).type_as(x)


def assembled(x, cos, sin):
    """The same, written piece by piece."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    out = torch.empty_like(x)
    out[..., 0::2] = one * cos - two * sin
    out[..., 1::2] = one * sin + two * cos
    return out


def put(x, index, value):
    x[index] = value[index]
    return x


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def cases():
    """name → a function of the inputs after it, all of which need gradients."""
    w, b, scale = frozen(6, 8), frozen(6), frozen(8)
    norm = partial(F.layer_norm, normalized_shape=(8,), weight=frozen(8), bias=frozen(8))
    group = partial(F.group_norm, num_groups=2, weight=frozen(4), bias=frozen(4))
    mask, keys, values = torch.rand(5, 7) > 0.3, frozen(2, 2, 7, 4), frozen(2, 2, 7, 3)
    bias = frozen(2, 1, 5, 7)
    mask[:, 0] = True
    attend = F.scaled_dot_product_attention
    x, row, image = (3, 5, 8), (3, 1, 8), (2, 4, 6, 5)
    q, k, v = (2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)
    return {
        "linear": (lambda x: F.linear(x, w, b), x),
        "linear trainable": (F.linear, x, (6, 8), (6,)),
        "linear trainable without bias": (F.linear, x, (6, 8)),
        "linear trainable after a norm": (lambda x, w: F.linear(norm(x), w), x, (6, 8)),
        "layer_norm": (norm, x),
        "layer_norm plain": (lambda x: F.layer_norm(x, (5, 8)), x),
        "layer_norm of one row": (lambda x: F.layer_norm(x, (8,), scale), (8,)),
        "layer_norm modulated": (lambda x, s, t: F.layer_norm(x, (8,)) * (1 + s) + t, x, row, row),
        "rms_norm": (lambda x: F.rms_norm(x, (8,), scale, 1e-6), x),
        "rms_norm without eps": (lambda x: F.rms_norm(x, (8,)), x),
        "rms_norm written out": (lambda x: rms(x) * scale, x),
        "group_norm": (group, image),
        "group_norm of tokens": (group, (2, 4, 3)),
        "group_norm channels last": (lambda x: group(x.to(memory_format=torch.channels_last)), image),
        "group_norm and silu": (lambda x: F.silu(group(x)), image),
        "group_norm, addcmul and silu": (lambda x, s: F.silu(torch.addcmul(n := group(x), n, s)), image, (2, 4, 1, 1)),
        "silu": (F.silu, x),
        "gelu": (F.gelu, x),
        "gelu tanh": (lambda x: F.gelu(x, approximate="tanh"), x),
        "sigmoid": (torch.sigmoid, x),
        "tanh": (torch.tanh, x),
        "relu": (F.relu, x),
        "geglu": (lambda x: (h := x.chunk(2, dim=-1))[0] * F.gelu(h[1]), x),
        "geglu tanh, gate first": (lambda x: F.gelu((h := x.chunk(2, dim=-1))[0], approximate="tanh") * h[1], x),
        "swiglu": (lambda a, g: F.silu(g) * a, x, x),
        "approximate gelu": (lambda x: x * torch.sigmoid(1.702 * x), x),
        "tanh gate": (lambda a, g: a * g.tanh(), x, x),
        "a part of an activation is no gate": (lambda x: (h := F.silu(x).chunk(2, dim=-1))[0] * h[1], x),
        "an activation that is used twice": (lambda a, g: (s := F.silu(g)) * a + s, x, x),
        "mul": (torch.mul, x, x),
        "mul by a row": (lambda x, s: s * x, x, row),
        "mul of rows": (torch.mul, (3, 1, 8), (5, 1)),
        "mul by itself": (lambda x: x * x, x),
        "addcmul": (torch.addcmul, x, x, row),
        "addcmul of a row": (lambda t, x, s: x + torch.addcmul(t, x, s), row, x, row),
        "div": (lambda x, y: x / (1 + y.square()), x, x),
        "div by a row": (lambda x, y: x / (1 + y.square()), x, row),
        "square": (lambda x: x**2, x),
        "matmul": (torch.matmul, q, (2, 2, 4, 7)),
        "matmul spread": (torch.matmul, (2, 2, 5, 4), (4, 7)),
        "bmm of a weight": (lambda w, x: torch.bmm(w.expand(len(x), -1, -1), x), (3, 5), (2, 5, 7)),
        "baddbmm": (torch.baddbmm, (2, 3, 7), (2, 3, 5), (2, 5, 7)),
        "attention": (attend, q, k, v),
        "attention of views": (lambda x, y: attend(heads(x), heads(y), heads(y)), x, (3, 6, 8)),
        "attention of one tensor": (lambda x: attend(*(heads(one) for one in x.chunk(3, dim=-1))), (2, 5, 24)),
        "attention with frozen keys": (lambda q: attend(q, keys, values, scale=0.3), q),
        "attention masked": (lambda q, k, v: attend(q, k, v, attn_mask=mask), q, k, v),
        "attention with a bias": (lambda q, k, v: attend(q, k, v, attn_mask=bias), q, k, v),
        "attention causal": (lambda q, k, v: attend(q, k, v, is_causal=True), q, k, v),
        "attention of groups": (lambda q, k, v: attend(q, k, v, enable_gqa=True), (2, 4, 5, 4), k, v),
        "attention turned": (lambda x, w: attend(*[heads(rotary(rms(F.linear(x, w)), scale, scale))] * 3), x, (8, 8)),
        "attention turned in complex numbers": (lambda x, w: attend(*[heads(turned(F.linear(x, w), angles))] * 3), x, (8, 8)),
        "attention assembled": (lambda x: attend(*[heads(assembled(norm(x), angles.cos(), angles.sin()))] * 3), x),
        "written to twice": (lambda x: F.silu(put(put(torch.empty_like(x), 0, norm(x)), 1, x)), (2, 5, 8)),
        "joint attention": (lambda x, y: attend(*[torch.cat([heads(norm(x)), heads(norm(y))], dim=2)] * 3), x, (3, 2, 8)),
        "conv1d": (lambda x: F.conv1d(x, conv1, padding=1), (2, 4, 6)),
        "conv2d": (lambda x: F.conv2d(x, conv2, b, 2, (1, 0), 1, 2), image),
        "conv2d same": (lambda x: F.conv2d(x, conv2, padding="same", groups=2), image),
        "conv2d channels last": (lambda x: F.conv2d(x.to(memory_format=torch.channels_last), conv2, groups=2), image),
        "conv3d": (lambda x: F.conv3d(x, conv3, stride=(1, 2, 1), dilation=(2, 1, 1)), (1, 2, 6, 5, 4)),
        "conv_transpose2d": (lambda x: F.conv_transpose2d(x, turn, stride=2, output_padding=1, groups=2), image),
    }


torch.manual_seed(0)
angles, conv1, conv2, conv3, turn = (
    torch.rand(5, 4),
    frozen(6, 4, 3),
    frozen(6, 2, 3, 3),
    frozen(3, 2, 2, 3, 1),
    frozen(4, 3, 3, 3),
)
angles = angles.double()
CASES = cases()


def inputs_of(name):
    return [wanted(*shape) for shape in CASES[name][1:]]


@pytest.mark.parametrize("name", CASES)
def test_exact_gradients(name):
    assert torch.autograd.gradcheck(lambda *inputs: run("exact", CASES[name][0], *inputs), inputs_of(name))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_the_same_bit_for_bit(name, mode):
    function, inputs = CASES[name][0], inputs_of(name)
    assert torch.equal(run(mode, function, *inputs), function(*inputs))


BARS = {
    "exact": 1e-12,
    "8bit": 0.05,
    "4bit": 0.4,
    "recompute": 0.4,
}  # of so few elements; a wrong formula is off by more than all of it


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_near_to_the_exact_ones(name, mode):
    function, inputs = CASES[name][0], inputs_of(name)
    plain, found = function(*inputs), run(mode, function, *inputs)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= BARS[mode] * other.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_kept_beside_what_autograd_is_handed(name, mode):
    output = run(mode, CASES[name][0], *inputs_of(name))
    for node in nodes(output):
        assert not tensors_in(getattr(node, "__dict__", {})), node


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_that_autograd_is_not_asked_for_are_its_own_bit_for_bit(dtype):
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(2, 64, dtype=dtype)
    functions = {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu tanh": partial(F.gelu, approximate="tanh"),
        **{name: lambda x, act=act: (h := x.chunk(2, dim=-1))[0] * act(h[1]) for name, act in GATES.items()},
        "layer_norm": lambda x: F.layer_norm(x, (64,), weight, bias),
        "layer_norm plain": lambda x: F.layer_norm(x, (5, 64)),
    }
    for name, function in functions.items():
        plain = function(x)
        gradient = torch.randn_like(plain)
        (expected,) = torch.autograd.grad(plain, x, gradient)
        assert torch.equal(torch.autograd.grad(run("exact", function, x), x, gradient)[0], expected), name


GATES = {
    "gated silu": F.silu,
    "gated gelu": F.gelu,
    "gated sigmoid": torch.sigmoid,
    "gated tanh": torch.tanh,
    "gated relu": F.relu,
}


def test_backward_under_autocast_computes_as_forward_did():
    q, k, v, w = wanted(2, 2, 5, 4), wanted(2, 2, 7, 4), wanted(2, 2, 7, 3), wanted(6, 4)
    inputs = [one.detach().float().requires_grad_() for one in (q, k, v, w)]
    function = lambda q, k, v, w: F.scaled_dot_product_attention(q, k, v).sum() + F.linear(q, w).square().sum()  # noqa: E731
    expected = torch.autograd.grad(run("exact", function, *inputs), inputs)
    output = run("exact", function, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(output, inputs)
    assert all(map(torch.equal, found, expected))


def test_in_place_changes_are_seen():
    """What is known of a tensor is not known of it any longer once it is written to."""
    x, w = wanted(4, 8), wanted(3, 8)

    def function(x):
        y = F.layer_norm(x, (8,))
        with torch.no_grad():
            y.mul_(2)
        return F.linear(y, w)

    found = run("exact", function, x)
    (expected,) = torch.autograd.grad(F.linear(F.layer_norm(x, (8,)) * 2, w).sum(), w)
    assert torch.allclose(torch.autograd.grad(found.sum(), w)[0], expected, rtol=1e-12)


def test_weights_changed_between_forward_and_backward_are_refused():
    x = wanted(2, 4, 8, 8)
    for function, weight in (
        (lambda x, w: F.conv2d(x, w), frozen(3, 4, 3, 3)),
        (lambda x, w: F.group_norm(x, 2, w), frozen(4)),
        (lambda x, w: F.layer_norm(x, (8,), w), frozen(8)),
    ):
        for mode in MODES:
            output = run(mode, function, x, weight)
            weight.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                output.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward_is_refused(mode):
    output = run(mode, lambda x: F.silu(F.group_norm(x, 2)), wanted(2, 4, 8, 8))
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()


def test_squares_are_followed_however_they_are_written():
    for square in (torch.square, lambda x: x**2, lambda x: x.pow(2.0), lambda x: torch.pow(x, exponent=2)):
        assert run("8bit", square, wanted(3, 8)).grad_fn.name() == "squareBackward"


def test_nan_stays_nan():
    x = wanted(4, 64)
    with torch.no_grad():
        x[1, 3] = torch.nan
    for mode in MODES:
        (gradient,) = torch.autograd.grad(run(mode, F.gelu, x).sum(), x)
        assert gradient[1].isnan().any() and not gradient[2:].isnan().any()


def test_what_is_no_business_of_ours_is_left_alone():
    x, trained = wanted(4, 8), wanted(8)
    functions = {
        "an affine that is trained": lambda: F.layer_norm(x, (8,), trained),
        "no gradient": lambda: F.silu(x.detach()),
        "dropout": lambda: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        "a power that is no square": lambda: x**3,
    }
    for name, function in functions.items():
        output = run("8bit", function)
        assert output.grad_fn is None or "program" not in vars_of(output.grad_fn), name
    assert run("8bit", lambda: torch.arange(8).view(2, 4) * torch.arange(4)).dtype == torch.int64


def vars_of(node):  # of autograd's own none
    return getattr(node, "__dict__", {})


def test_outliers_of_a_channel_cost_its_neighbours_nothing():
    q, k, v = (torch.randn(2, 64, 64) for _ in range(3))
    size = torch.ones(64)
    size[5] = 2**7
    weights = torch.randn(2, 1, 64, 64)
    found = []
    for scale in (torch.ones(64), size):
        inputs = [(q * scale).requires_grad_(), (k / scale).requires_grad_(), v.clone().requires_grad_()]
        output = run("8bit", lambda q, k, v: F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]), *inputs)
        found.append(torch.autograd.grad((output * weights).sum(), inputs[2])[0])
    plain = [q, k, v.clone().requires_grad_()]
    output = F.scaled_dot_product_attention(*(one[:, None] for one in plain))
    (expected,) = torch.autograd.grad((output * weights).sum(), plain[2])
    even, uneven = ((one - expected).norm() for one in found)
    assert uneven <= 2 * even


def test_a_module_of_everything_in_half_precision():
    """bfloat16: what is kept is in bytes, and gradients are no worse than twice what plain bfloat16 loses."""
    torch.manual_seed(1)
    block = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU()).requires_grad_(False)
    x = torch.randn(2, 16, 16, 16)
    gradients = {}
    for name, dtype, mode in (("plain", torch.bfloat16, None), ("exact", torch.bfloat16, "exact"), ("64", torch.float64, None)):
        module, given = block.to(dtype), x.to(dtype).requires_grad_()
        output = module(given) if mode is None else run(mode, module, given)
        (gradients[name],) = torch.autograd.grad(output.square().sum(), given)
    lost = (gradients["plain"].double() - gradients["64"]).abs().max()
    assert (gradients["exact"].double() - gradients["64"]).abs().max() <= 2 * lost
