"""The packing ops against plain torch in float64: their layout bit by bit, their errors from the scales, their gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from agd_fast.memory import ops
from agd_fast.memory.ops.geglu_pack import by_rows

EVEN = [-12, -10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10]  # levels by nibble, of which the first is not used
SIDED = list(range(-2, 14))
QUARTERS = [6, -6] * 6 + [2, -2] * 10  # levels whose quarters have mean 0 and mean square 1, as a normalised row has


def random(*shape, dtype=torch.float32, outliers=True):
    """With values of all magnitudes, and zeros."""
    x = torch.randn(shape) * torch.randint(-3, 4, shape).float().exp2()
    if outliers and x.numel():
        x.view(-1)[:: max(1, x.numel() // 3)] *= 100
        x.view(-1)[1::7] = 0
    return x.to(dtype)


def dequantised(codes, scales, n, bits, group):
    """Levels and steps [R, n] of codes [R, pitch] and scales [R, groups], in float64, bit by bit."""
    numbers = codes.numpy().astype(np.int64)
    steps = np.repeat(scales.double().numpy(), group, axis=1)[:, :n]
    if bits == 4:
        nibbles = np.stack((numbers % 16, numbers // 16), -1).reshape(len(numbers), -1)[:, :n]
        levels = np.where(np.signbit(steps), np.array(SIDED)[nibbles], np.array(EVEN)[nibbles])
    else:
        levels = np.where(numbers < 128, numbers, numbers - 256)
    return torch.from_numpy(levels), torch.from_numpy(np.abs(steps))


def nearest(x, scales, bits, group):
    """How far the nearest level of its group is from each of x, flat: float64."""
    steps = scales.double().repeat_interleave(group)[: x.numel(), None]
    if bits == 8:
        levels = torch.arange(-127, 128)
    else:
        levels = torch.where(steps.signbit(), torch.tensor(SIDED), torch.tensor([*EVEN[1:], 10]))
    return (x.double().flatten()[:, None] - levels * steps.abs()).abs().amin(1)


def half_gap(x, scales, bits, group):
    """Half the way between two levels at each of x, in x's shape."""
    steps = scales.double().repeat_interleave(group)[: x.numel()].view(x.shape)
    coarse = (bits == 4) & ~steps.signbit() & (x.double().abs() > 4 * steps)
    return steps.abs() * torch.where(coarse, 1, 0.5)


def normal_rows(R, n, bits, group):
    """Codes and scales of R normalised rows, and the rows in float64; exactly, where n is a multiple of 32."""
    quarters = torch.stack([torch.tensor(QUARTERS * (n // 32))[torch.randperm(n)] for _ in range(R)])
    nibbles = quarters - quarters.sign() * (quarters.abs() == 6) + 8  # the level 6 has the place 5
    codes = quarters if bits == 8 else nibbles[:, 0::2] + nibbles[:, 1::2] * 16
    scales = torch.full((R, -(-n // group)), 0.25, dtype=torch.bfloat16)
    return (codes % 256).to(torch.uint8), scales, quarters.double() / 4


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (8, [127, -127, 0.5, 1.5, -0.5, -1.5, 2.5, 0], [127, 129, 0, 2, 0, 254, 2, 0]),
        (4, [10, -10, 0.5, 1.5, -0.5, -1.5, 2.5], [0x1F, 0xA8, 0x68, 0x8A]),  # the last nibble is beyond the end: 0
        (4, [10, -8, 5, 7, -5, -7, 9, -9], [0x2F, 0xEC, 0x24, 0x2E]),
        (4, [13, -2, 0.5, 1.5, -0.5, 5, 2.5], [0x0F, 0x42, 0x72, 0x24]),
    ],
)
def test_layout_of_codes_with_ties_to_even(bits, values, expected):
    codes, scales = ops.pack(torch.tensor(values, dtype=torch.bfloat16), bits, 32)
    assert codes.dtype == torch.uint8 and codes.tolist() == expected
    assert scales.dtype == torch.bfloat16 and scales.tolist() == [-1 if 13 in values else 1]


@given(
    st.integers(0, 300),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_pack(n, bits, group, dtype, seed):
    torch.manual_seed(seed)
    x = random(n, dtype=dtype)
    codes, scales = ops.pack(x, bits, group)
    assert codes.shape == (-(-n * bits // 8),) and scales.shape == (-(-n // group),)
    numbers, steps = dequantised(codes[None], scales[None], n, bits, group)
    assert_smallest_scales(x, scales, bits, group)
    found = ops.unpack(codes, scales, [n], bits, group, torch.float64)
    assert torch.equal(found, (numbers * steps)[0])
    # of float32 and float64, the quotient is rounded once more before it becomes a code: by half an ulp below 128 at most
    slack = {torch.float32: 2.0**-18, torch.float64: 2.0**-47}.get(dtype, 0.0)
    assert ((found - x.double()).abs() <= nearest(x, scales, bits, group) + steps[0] * slack).all()
    for wanted in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(ops.unpack(codes, scales, [1, n], bits, group, wanted), found.to(torch.float32).to(wanted)[None])


def assert_smallest_scales(x, scales, bits, group):
    """Each is the smallest bfloat16 at which its levels reach all of the group, and no other levels need a smaller one."""
    padded = F.pad(x.double(), (0, len(scales) * group - x.numel())).view(-1, group)
    most, least = (padded.amax(-1), padded.amin(-1)) if x.numel() else torch.zeros(2, 0)
    magnitude = torch.maximum(most, -least)
    even, sided = magnitude / (127 if bits == 8 else 10), torch.maximum(most / 13, -least / 2)
    needed = torch.where(scales.signbit(), sided, even)
    below = (scales.view(torch.int16) - 1).view(torch.bfloat16).abs().double()  # the next smaller bfloat16; of 0 there is none
    below = below.masked_fill(scales == 0, 0)
    rounding = 1 + 2.0**-22
    assert (scales.abs().double() * rounding >= needed).all() and (below <= needed * rounding).all()
    if bits == 8:
        assert not scales.signbit().any()
    else:
        assert (scales.abs().double() <= torch.minimum(even, sided) * (1 + 2.0**-7) * rounding).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("side", [F.relu, F.gelu, lambda x: -F.gelu(x), torch.sigmoid, lambda x: x])
def test_levels_lie_where_the_values_do(side, bits):
    """Of what lies on one side, errors are as small as 15 steps allow, wherever they are better so."""
    x = side(torch.randn(64 * 32))
    codes, scales = ops.pack(x, bits, 32)
    assert_smallest_scales(x, scales, bits, 32)
    error = (ops.unpack(codes, scales, [x.numel()], bits, 32, torch.float64) - x.double()).square().mean().sqrt()
    even = x.view(-1, 32).abs().amax(-1, keepdim=True) / 7
    uniform = (x - (x.view(-1, 32) / even).round().mul(even).flatten()).double().square().mean().sqrt()
    expected_sided = bits == 4 and side in (F.relu, F.gelu, torch.sigmoid)
    assert scales.signbit().float().mean() > 0.9 if expected_sided else scales.signbit().float().mean() < 0.1
    assert error < uniform * (0.65 if expected_sided else 1 if bits == 4 else 0.1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_group_with_what_is_not_finite_is_nan_and_no_other(bits, bad):
    x = random(5 * 32)
    clean = ops.pack(x, bits, 32)
    x[40] = bad
    codes, scales = ops.pack(x, bits, 32)
    assert scales.isnan().tolist() == [False, True, False, False, False]
    assert scales.view(torch.int16)[1] == 0x7FC0
    assert set(codes[32 * bits // 8 : 64 * bits // 8].tolist()) == {0 if bits == 8 else 0x88}
    found = ops.unpack(codes, scales, [160], bits, 32, torch.float32)
    assert found[32:64].isnan().all()
    kept = [*range(32), *range(64, 160)]
    assert torch.equal(found[kept], ops.unpack(*clean, [160], bits, 32, torch.float32)[kept])


@pytest.mark.parametrize("bits", [4, 8])
def test_groups_of_zeros_tiny_and_huge_values(bits):
    most = torch.finfo(torch.float32).max
    x = torch.cat([torch.zeros(32), torch.full((32,), 1e-42), torch.full((32,), -most), torch.full((32,), 2.0**-94)])
    codes, scales = ops.pack(x, bits, 32)
    assert scales[0] == 0 and scales[1] == 2.0**-100
    found = ops.unpack(codes, scales, [128], bits, 32, torch.float64)
    assert (found[:64] == 0).all()
    assert ((found - x.double()).abs() <= half_gap(x, scales, bits, 32) * (1 + 2.0**-17)).all()


@given(
    st.integers(1, 5),
    st.integers(1, 150),
    st.sampled_from([4, 8]),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_norm_pack_packs_every_row_for_itself(R, n, bits, group, centred, seed):
    torch.manual_seed(seed)
    x = random(R, n, dtype=torch.bfloat16)
    mean, rstd = torch.randn(R) if centred else None, torch.rand(R) + 0.5
    codes, scales = ops.norm_pack(x, mean, rstd, bits, group)
    assert codes.shape == (R, -(-n * bits // 8)) and scales.shape == (R, -(-n // group))
    for row in range(R):
        normed = (x[row].float() - (mean[row] if centred else 0)) * rstd[row]
        for one, whole in zip(ops.pack(normed, bits, group), (codes, scales), strict=True):
            assert torch.equal(one, whole[row])
    found = ops.affine_unpack(codes, scales, None, None, [R, n], R, 1, 1, bits, group, torch.float64)
    numbers, steps = dequantised(codes, scales, n, bits, group)
    assert torch.equal(found, numbers * steps)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 64), (8, 128)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "group_norm"])
def test_norm_backward_is_the_norms_gradient(kind, affine, bits, group):
    B, C, S, G = 2, 12, 16, 3
    R, n = (B * G, C // G * S) if kind == "group_norm" else (5, 96)
    codes, scales, normed = normal_rows(R, n, bits, group)
    deviation, mean = torch.rand(R, 1, dtype=torch.float64) + 0.5, torch.randn(R, 1, dtype=torch.float64)
    x = normed * deviation + (0 if kind == "rms_norm" else mean)
    gamma = torch.randn(C if kind == "group_norm" else n, dtype=torch.float64) if affine else None
    size, channels = ((B, C, 4, 4), (G, S)) if kind == "group_norm" else ((R, n), (1, 1))
    x = x.view(size).requires_grad_()
    if kind == "group_norm":
        y = F.group_norm(x, G, gamma, eps=0.0)
    elif kind == "layer_norm":
        y = F.layer_norm(x, [n], gamma, eps=0.0)
    else:
        y = F.rms_norm(x, [n], gamma, eps=0.0)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    rstd = 1 / deviation
    found = ops.norm_backward(dy, codes, scales, rstd, gamma, kind != "rms_norm", *channels, bits, group)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if gamma is not None:
        gamma = gamma.bfloat16()
    low = ops.norm_backward(dy.bfloat16(), codes, scales, rstd.float(), gamma, True, *channels, bits, group)
    assert low.dtype == torch.bfloat16 and low.shape == size


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (8, 128)])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", ["layer_norm", "group_norm"])
def test_affine_unpack_and_the_gradient_of_its_silu(kind, samples, bits, group):
    B, C, G, T = 2, 12, 3, 4
    R, n, layout = (B * G, C // G * 16, (G, G, 16)) if kind == "group_norm" else (B * T, 96, (T, 1, 1))
    codes, scales, normed = normal_rows(R, n, bits, group)
    size = (B, C, 4, 4) if kind == "group_norm" else (B, T, n)
    A, offset = torch.randn(2, samples, C if kind == "group_norm" else n, dtype=torch.float64)
    shaped = (-1, C, 1, 1) if kind == "group_norm" else (-1, 1, n)
    expected = (normed.view(size) * A.view(shaped) + offset.view(shaped)).requires_grad_()
    arguments = codes, scales, A, offset
    found = ops.affine_unpack(*arguments, list(size), *layout, bits, group, torch.float64)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-14, atol=1e-14)
    dy = torch.randn(size, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(F.silu(expected), expected, dy)
    found = ops.silu_affine_backward(dy, *arguments, *layout, bits, group)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12)
    scaled = ops.affine_unpack(codes, scales, A.float(), None, list(size), *layout, bits, group, torch.float32)
    assert torch.equal(scaled, normed.view(size).float() * A.float().view(shaped))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_a_packed_derivative_is_off_by_half_a_step(activation, bits):
    x = (3 * torch.randn(5, 77, dtype=torch.float64)).requires_grad_()
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    y = F.silu(x) if activation == "silu" else F.gelu(x, approximate=approximate)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)
    with torch.no_grad():
        packed = ops.silu_pack(x, bits, 64) if activation == "silu" else ops.gelu_pack(x, approximate, bits, 64)
        found = ops.scale_unpack(dy, *packed, bits, 64)
        assert ((found - expected).abs() <= dy.abs() * (half_gap(expected / dy, packed[1], bits, 64) + 1e-12)).all()
        assert torch.equal(found, dy * ops.unpack(*packed, list(x.shape), bits, 64, torch.float64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_gated_backward_is_off_by_half_a_step_of_each_factor(activation, bits):
    x = (2 * torch.randn(2, 3, 2 * 37, dtype=torch.float64)).requires_grad_()
    a, g = x.chunk(2, -1)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    y = a * (F.silu(g) if activation == "silu" else F.gelu(g, approximate=approximate))
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, dy)

    def packed_of(a, g):
        return ops.swiglu_pack(a, g, bits, 32) if activation == "silu" else ops.geglu_pack(a, g, approximate, bits, 32)

    with torch.no_grad():
        packed = packed_of(a, g)
        found = ops.geglu_backward(dy, *packed, bits, 32)
        exact = [half / dy for half in expected.chunk(2, -1)]
        gaps = [half_gap(one, scales, bits, 32) for one, scales in zip(exact, packed[1::2], strict=True)]
        allowed = torch.cat([dy.abs() * (gap + 1e-12) for gap in gaps], -1)
        assert found.shape == x.shape and ((found - expected).abs() <= allowed).all()
        for strided, whole in zip(packed, packed_of(a.contiguous(), g.contiguous()), strict=True):
            assert torch.equal(strided, whole)


def test_rows_that_a_kernel_can_stride_over_are_not_copied():
    x = torch.randn(2, 3, 10)
    a, g = x.chunk(2, -1)
    for half in (a, g):
        found, apart = by_rows(half)
        assert found is half and apart == 10
    for other, apart in ((x, 10), (x[0, 0], 10), (x[0], 10)):
        found, stride = by_rows(other)
        assert found is other and stride == apart
    for irregular in (x[:, :1], x[:, :2], x.transpose(1, 2), x[..., ::2]):
        found, apart = by_rows(irregular)
        assert found.is_contiguous() and torch.equal(found, irregular) and apart == irregular.shape[-1]


def test_what_is_not_contiguous_is_packed_in_the_order_of_its_dimensions():
    x = random(6, 8, 5).transpose(0, 2)
    for one, other in zip(ops.pack(x, 8, 32), ops.pack(x.contiguous(), 8, 32), strict=True):
        assert torch.equal(one, other)
    packed = ops.pack(x, 8, 32)
    assert torch.equal(ops.scale_unpack(x, *packed, 8, 32), ops.scale_unpack(x.contiguous(), *packed, 8, 32))


def test_the_gradient_of_gelu_in_its_own_words():
    """Φ(x) + x·φ(x) at a place known by hand: x = 0 and far out."""
    packed = ops.gelu_pack(torch.tensor([0.0, 40.0, -40.0], dtype=torch.float64), "none", 8, 32)
    found = ops.unpack(*packed, [3], 8, 32, torch.float64)
    step = float(packed[1])
    assert math.isclose(found[0], 0.5, abs_tol=step / 2) and math.isclose(found[1], 1, abs_tol=step / 2) and found[2] == 0
