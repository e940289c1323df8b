"""Kernels of the products, interpreted: at the borders of tiles, of views, with every optional argument and configuration."""

import math
from itertools import product

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from helpers_kernels import arguments, assert_kernel, channels_last, configs, interpreted, made, outputs

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of which the reciprocal is taken, as it should be
NAMES = ("projection_scores", "projection_mix", "activated_linear", "gated_lora")
DTYPES = st.sampled_from([torch.float32, torch.float16])
BATCHES = st.sampled_from([1, 1, 2, 3, 5])
TOKENS = st.sampled_from([(1,), (15,), (17,), (63,), (64,), (65,), (129,), (3, 7), ()])
WIDTHS = st.sampled_from([1, 7, 15, 16, 17, 33, 63, 64, 65, 129, 257])
LAYOUTS = st.sampled_from(["contiguous", "offset", "strided", "transposed", "expanded"])


def few(test):
    return settings(derandomize=True, deadline=None, max_examples=80, phases=[Phase.generate])(test)  # to shrink takes minutes


@st.composite
def a_config(draw, name):
    return draw(st.sampled_from([None, *configs(name)]))


@given(st.data())
@few
def test_projection_scores(data):
    torch.manual_seed(0)  # an example that fails is to fail again
    B, T, N, C, dtype = (data.draw(one) for one in (BATCHES, TOKENS.filter(bool), WIDTHS, WIDTHS, DTYPES))
    S = data.draw(st.sampled_from([1, 2, 15, 16, 17, 79, 127, 128]))
    x, weight, A = (
        made(data.draw(LAYOUTS), *shape, dtype=dtype, scale=scale)
        for shape, scale in (((B, *T, C), 1), ((N, C), 1), ((B, S, C), 2 / math.sqrt(C)))
    )
    bias = made(data.draw(LAYOUTS), N, dtype=dtype) if data.draw(st.booleans()) else None
    score_bias = made(data.draw(LAYOUTS), B, 1, S, dtype=torch.float32) if data.draw(st.booleans()) else None
    assert_kernel("projection_scores", x, weight, bias, A, score_bias, config=data.draw(a_config("projection_scores")))


@given(st.data())
@few
def test_projection_mix(data):
    torch.manual_seed(0)
    B, T, C, K, dtype = (data.draw(one) for one in (BATCHES, TOKENS, WIDTHS, WIDTHS, DTYPES))
    attended, weight, residual = (made(data.draw(LAYOUTS), *shape, dtype=dtype) for shape in ((B, *T, K), (C, K), (B, *T, C)))
    P = U = None
    if T and data.draw(st.booleans()):
        S = data.draw(st.sampled_from([1, 3, 16, 17, 64, 65, 128]))
        P, U = (made(data.draw(LAYOUTS), *shape, dtype=dtype) for shape in ((B, *T, S), (B, S, C)))
    bias = data.draw(st.sampled_from([None, (C,), (B, C)]))
    gate = data.draw(st.sampled_from([None, (1, C), (B, C)]))
    bias, gate = (None if shape is None else made(data.draw(LAYOUTS), *shape, dtype=dtype) for shape in (bias, gate))
    residual = residual if data.draw(st.booleans()) else None
    assert_kernel("projection_mix", attended, weight, bias, P, U, residual, gate, config=data.draw(a_config("projection_mix")))


@given(st.data())
@few
def test_activated_linear(data):
    torch.manual_seed(0)
    B, T, N, C, dtype = (data.draw(one) for one in (BATCHES, TOKENS, WIDTHS, WIDTHS, DTYPES))
    activation = data.draw(st.sampled_from(["geglu", "gelu", "gelu_tanh"]))
    rows = 2 * N if activation == "geglu" else N
    x, weight = (made(data.draw(LAYOUTS), *shape, dtype=dtype) for shape in ((B, *T, C), (rows, C)))
    bias = data.draw(st.sampled_from([None, (rows,), (B, rows)]))
    bias = None if bias is None else made(data.draw(LAYOUTS), *bias, dtype=dtype)
    assert_kernel("activated_linear", x, weight, bias, activation, config=data.draw(a_config("activated_linear")))


@given(st.data())
@few
def test_gated_lora(data):
    torch.manual_seed(0)
    B, T, C, K, dtype = (data.draw(one) for one in (BATCHES, TOKENS, WIDTHS, WIDTHS, DTYPES))
    first = bool(T) and data.draw(st.booleans())
    r = data.draw(st.sampled_from([1, 4, 15, 16, 17, 64]))
    shapes = ((B, K, *T), (B, C, *T)) if first else ((B, *T, K), (B, *T, C))
    hidden, output, down, up = (made(data.draw(LAYOUTS), *shape, dtype=dtype) for shape in (*shapes, (r, K), (C, r)))
    if first:
        hidden, output = (channels_last(image) if data.draw(st.booleans()) else image for image in (hidden, output))
    gates = data.draw(st.sampled_from([None, (1, r), (B, r)]))
    gates = None if gates is None else made(data.draw(LAYOUTS), *gates, dtype=dtype)
    assert_kernel("gated_lora", hidden, output, down, up, gates, first, config=data.draw(a_config("gated_lora")))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"B": 64},
        {"K": 0},
        {"C": 0},
        {"S": 0, "r": 0},
        {"S": 0, "C": 0},
        {"T": 1, "K": 1, "C": 2, "S": 1, "r": 1},
        {"T": 130, "K": 130, "C": 514, "S": 128, "r": 64},
        {"B": 5, "T": 130, "K": 17, "C": 258},
    ],
    ids=str,
)
def test_sizes(name, sizes):
    for config in configs(name) if "T" in sizes else (None,):
        assert_kernel(name, *arguments(name, **sizes, dtype=torch.float16), config=config)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("sizes", "shape"), [({"B": 0}, (0, 3)), ({"T": 0}, (2, 0))], ids=str)
def test_empty(name, sizes, shape):
    found = interpreted(name, *arguments(name, **sizes))
    last = {"projection_scores": (8, 4), "activated_linear": (4,)}.get(name, (8,))
    assert [one.shape for one in outputs(found)] == [(*shape, channels) for channels in last]


@pytest.mark.parametrize("places", [(35,), (5, 7), (2, 3, 5)])
def test_gated_lora_of_images_of_any_layouts(places):
    images = [torch.randn(3, width, *places) for width in (6, 8)]
    for hidden, output in product(*((image[1:], channels_last(image)[1:]) for image in images)):
        assert_kernel("gated_lora", hidden, output, torch.randn(4, 6), torch.randn(8, 4), torch.randn(2, 4), True)


def test_projection_scores_leave_masked_tokens_out():
    x, weight, bias, A, score_bias = arguments("projection_scores", T=5, S=17)
    score_bias[:, :, 3:] = -math.inf
    assert_kernel("projection_scores", x, weight, bias, A, score_bias)
    assert not interpreted("projection_scores", x, weight, bias, A, score_bias)[1][..., 3:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_projection_scores_of_large_scores(dtype):
    """Which float16 rounds by more than what softmax tells apart, and whose exponentials overflow."""
    x, weight, bias, A, _ = arguments("projection_scores", T=17, S=31, dtype=dtype)
    found = interpreted("projection_scores", 40 * x, weight, bias, 10 * A)[1]
    exact = torch.softmax((40 * x).double() @ (10 * A).double().mT, -1)
    assert (found.double() - exact).abs().max() <= 3e-4  # float16 rounds what is near 1 by 2.4e-4


@pytest.mark.parametrize("activation", ["geglu", "gelu", "gelu_tanh"])
def test_activated_linear_of_large_values(activation):
    x, weight = torch.linspace(-60, 60, 241)[:, None], torch.ones(2, 1)
    assert_kernel("activated_linear", x, weight, None, activation)


@pytest.mark.parametrize("name", NAMES)
def test_another_config_is_the_same_to_a_rounding(name):
    given = arguments(name, T=33, K=70, C=40)
    for config in configs(name):
        assert_kernel(name, *given, config=config)
