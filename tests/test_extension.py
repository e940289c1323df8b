"""The compiled extension: what is known of it, its arithmetic on the CPU bit by bit, its errors without a GPU."""

import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import agd_fast as agd
from agd_fast import environment
from agd_fast.memory import extension as extension_module
from agd_fast.memory import ops
from agd_fast.memory.extension import covers, extension, extension_info
from agd_fast.memory.ops import launching
from agd_fast.memory.ops.activations import gelu_derivative, silu_derivative
from agd_fast.memory.ops.layout import pitch, quantise
from helpers_packing import arguments

compiled = pytest.mark.skipif(extension() is None, reason=f"not compiled here: {extension_info()['reason']}")
without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU here: bench/packing_kernels.py runs the kernels"
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def test_extension_info_says_what_is_there():
    info = extension_info()
    assert set(info) == {"loaded", "reason", "architectures", "cuda"}
    assert info["loaded"] == (not info["reason"]) == bool(info["architectures"]) == (info["cuda"] is not None)


def test_info_tells_a_user(monkeypatch):
    loaded = {"loaded": True, "reason": "", "architectures": ["sm_80", "compute_90"], "cuda": "13.0"}
    for found, said in (
        (loaded, "loaded, CUDA 13.0, for sm_80 compute_90"),
        ({**loaded, "loaded": False, "reason": "was not built"}, "PyTorch stands in for it: was not built"),
    ):
        monkeypatch.setattr(environment, "extension_info", lambda found=found: found)
        assert agd.info()["environment"]["extension"] == said


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'agd_fast._cuda'", name="agd_fast._cuda"), "was not built"),
        (ModuleNotFoundError("No module named 'other'", name="other"), "does not load: No module named 'other'"),
        (ImportError("libc.so.7: cannot open shared object file"), "does not load: libc.so.7"),
    ],
)
def test_an_extension_that_does_not_load_says_why(error, reason):
    extension_module._loaded.cache_clear()
    try:
        with patch.object(extension_module, "import_module", side_effect=error):
            info = extension_info()
            assert extension() is None
        assert not info["loaded"] and reason in info["reason"]
        assert (info["architectures"], info["cuda"]) == ([], None)
    finally:
        extension_module._loaded.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_80", "sm_90", "compute_90"], (8, 0), True),
        (["sm_80", "sm_90", "compute_90"], (8, 9), True),
        (["sm_80", "sm_90", "compute_90"], (7, 5), False),
        (["sm_80", "sm_90", "compute_90"], (10, 0), True),
        (["sm_86"], (8, 0), False),
        (["sm_90"], (10, 0), False),
        (["sm_120"], (12, 1), True),
        (["compute_100"], (9, 0), False),
    ],
)
def test_which_cards_code_runs_on(architectures, capability, runs):
    assert covers(architectures, capability) == runs


def on_host(x, bits, group, R=1):
    """Codes and scales of R rows by the device's code, with guards behind them that it must not touch."""
    n = x.numel() // R
    codes = torch.full((R * pitch(n, bits) + 8,), 0xAB, dtype=torch.uint8)
    scales = torch.full((R * -(-n // group) + 8,), 7.0, dtype=torch.bfloat16)
    kind = launching.TYPES[x.dtype]
    extension().host_pack(R, n, kind, bits, group, x.data_ptr(), codes.data_ptr(), scales.data_ptr())
    assert (codes[-8:] == 0xAB).all() and (scales[-8:] == 7).all()
    return codes[:-8], scales[:-8]


def assert_packed_as_the_reference(x, bits, group, R=1):
    codes, scales = on_host(x, bits, group, R)
    expected_codes, expected_scales = quantise(x.view(R, -1), bits, group)
    assert torch.equal(codes, expected_codes.flatten())
    assert torch.equal(scales.view(torch.int16), expected_scales.flatten().view(torch.int16))
    n = x.numel() // R
    for dtype in DTYPES:
        found = torch.empty(x.numel(), dtype=dtype)
        addresses = codes.data_ptr(), scales.data_ptr(), found.data_ptr()
        extension().host_unpack(R, n, launching.TYPES[dtype], bits, group, *addresses)
        expected = ops.affine_unpack(expected_codes, expected_scales, None, None, [R, n], R, 1, 1, bits, group, dtype).flatten()
        kept = ~expected.isnan()
        assert torch.equal(found.isnan(), ~kept) and torch.equal(found[kept], expected[kept])


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_on_the_host_is_the_references_bit_for_bit(bits, group, dtype):
    """Of values of all magnitudes: with outliers, denormal, tied, not finite, groups of zeros."""
    tiny, most = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    normal = torch.randn(40, 1000)
    for x in (
        normal,
        normal * torch.randint(-12, 12, normal.shape).float().exp2(),
        torch.where(torch.rand_like(normal) < 0.01, 100 * normal, normal),
        normal * tiny,
        normal * 2.0**-98,  # about the smallest scale
        normal.clamp(-1, 1) * most,
        torch.where(torch.rand_like(normal) < 0.003, torch.inf, normal),
        torch.where(torch.rand_like(normal) < 0.003, torch.nan, normal),
        torch.where((torch.arange(1000) // 100) % 2 == 0, torch.zeros(()), normal),
        torch.randint(-254, 255, (40, 1000)) / 2,  # ties
        torch.randint(-20, 21, (40, 1000)) / 2,
        torch.randint(-4, 27, (40, 1000)) / 2,  # ties of one side
        normal.relu(),
        F.gelu(normal),
        -F.gelu(normal),
        gelu_derivative(3 * normal, "none"),
    ):
        x = x.to(dtype)
        assert_packed_as_the_reference(x.flatten(), bits, group)
        assert_packed_as_the_reference(x[:, :333].contiguous().flatten(), bits, group, R=40)


@compiled
@given(st.integers(1, 7), st.integers(1, 400), st.sampled_from([4, 8]), st.sampled_from([32, 64, 128]), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_rows_of_any_length_on_the_host(R, n, bits, group, seed):
    torch.manual_seed(seed)
    assert_packed_as_the_reference(torch.randn(R * n).exp(), bits, group, R)


@compiled
def test_codes_are_those_of_the_correctly_rounded_quotient():
    """Of random bit patterns, whose quotients by a scale the kernel finds by a product and a correction."""
    bits = torch.randint(0, 2**31 - 1, (2**20,), dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x = torch.where(x.isfinite(), x, 1.0).view(-1, 32)
    x = torch.ldexp(torch.frexp(x).mantissa, torch.randint(-8, 1, x.shape))  # of magnitudes that get different codes
    assert_packed_as_the_reference(x.flatten(), 8, 32)


@compiled
@pytest.mark.parametrize("kind", ["none", "tanh", "silu"])
def test_activations_on_the_host(kind):
    """Off float64 by twice what torch is in float32, and a rounding."""
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.randn(1000) * 1e-3, torch.tensor([-1e4, 1e4, 0.0, -0.0])])
    value, derivative = torch.empty_like(x), torch.empty_like(x)
    extension().host_activation(launching.ACTIVATIONS[kind], x.numel(), x.data_ptr(), value.data_ptr(), derivative.data_ptr())

    def reference(x):
        if kind == "silu":
            return F.silu(x), silu_derivative(x)
        return F.gelu(x, approximate=kind), gelu_derivative(x, kind)

    for found, plain, exact in zip((value, derivative), reference(x), reference(x.double()), strict=True):
        lost = (plain.double() - exact).abs().max()
        eps = torch.finfo(torch.float32).eps
        assert ((found.double() - exact).abs() <= 2 * lost + eps * exact.abs()).all()


@compiled
@pytest.mark.parametrize(("R", "n", "G", "S"), [(6, 48, 3, 4), (4, 50, 2, 5), (5, 33, 1, 1), (4, 21, 4, 21), (64, 7, 32, 7)])
def test_channels_of_elements(R, n, G, S):
    found = torch.empty(R, n, dtype=torch.int64)
    extension().host_channels(R, n, G, S, found.data_ptr())
    expected = [[(row % G) * (n // S) + i // S for i in range(n)] for row in range(R)]
    assert found.tolist() == expected


@compiled
@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=500, deadline=None)
def test_division_by_a_product_and_a_shift(by, n):
    assert extension().host_divide(n, by) == n // by


@compiled
@without_gpu
@pytest.mark.parametrize("name", sorted(ops.REFERENCES))
def test_a_launch_without_a_gpu_says_what_failed(name, monkeypatch):
    """And it takes what the op hands over: other numbers or types of arguments would be a TypeError."""
    for module in (sys.modules[f"agd_fast.memory.ops.{one}"] for one in (name, "geglu_pack")):
        monkeypatch.setattr(module, "kernels_for", lambda *_: extension(), raising=False)
        monkeypatch.setattr(module, "where", lambda _: (0, 0), raising=False)
    with pytest.raises(RuntimeError, match=r"agd_fast\._cuda: .* failed with CUDA error \d+ \(cudaError\w+\): "):
        ops.LAUNCHERS[name](*arguments()[name])


@pytest.mark.parametrize("index", [0])
def test_a_card_that_the_code_does_not_run_on_is_left_to_torch(index, monkeypatch):
    extension_module.extension_on.cache_clear()
    fake = SimpleNamespace(architectures="sm_80 sm_90 compute_90")
    monkeypatch.setattr(extension_module, "extension", lambda: fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    try:
        assert extension_module.extension_on(index) is None
        extension_module.extension_on.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
        assert extension_module.extension_on(index) is fake
    finally:
        extension_module.extension_on.cache_clear()
