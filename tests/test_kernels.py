"""Kernels of norms, residuals and guidance, interpreted: any size and layout, every optional argument and configuration."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_fast.ops import OPS
from helpers_kernels import assert_kernel, configs, interpreted, made, outputs

NAMES = (
    "ada_layer_norm",
    "norm_scores",
    "gated_residual",
    "residual_norm",
    "ada_group_norm",
    "guidance_combine",
    "guided_update",
)
NORMS = ("ada_layer_norm", "norm_scores", "residual_norm", "ada_group_norm")
DTYPES = st.sampled_from([torch.float32, torch.float16])
BATCHES = st.sampled_from([1, 2, 3])
TOKENS = st.sampled_from([(1,), (5,), (33,), (3, 4), ()])
WIDTHS = st.sampled_from([2, 16, 37, 64, 129, 256, 1000])
LAYOUTS = st.sampled_from(["contiguous", "offset", "strided", "transposed", "expanded"])


def few(test):
    return settings(derandomize=True, deadline=None, max_examples=20)(given(st.data())(test))


class Draw:
    """Arguments of one example, all of a dtype."""

    def __init__(self, data):
        self.draw, self.dtype = data.draw, data.draw(DTYPES)

    def tensor(self, *shape, dtype=None):
        return made(self.draw(LAYOUTS), *shape, dtype=dtype or self.dtype)

    def row(self, B, C):
        """One a sample, one for all, or None."""
        rows = self.draw(st.sampled_from([None, 1, B, B]))
        return None if rows is None else self.tensor(rows, C)

    def config(self, name):
        return self.draw(st.sampled_from([None, *configs(name)]))


@few
def test_ada_layer_norm(data):
    draw = Draw(data)
    B, T, C = map(data.draw, (BATCHES, TOKENS, WIDTHS))
    assert_kernel(
        "ada_layer_norm", draw.tensor(B, *T, C), draw.row(B, C), draw.row(B, C), 1e-4, config=draw.config("ada_layer_norm")
    )


@few
def test_norm_scores(data):
    draw = Draw(data)
    B, T, C = map(data.draw, (BATCHES, TOKENS.filter(bool), WIDTHS))
    S, heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2), (6, 2), (9, 3), (16, 1), (16, 4)]))
    x, A = draw.tensor(B, *T, C), draw.tensor(B, S, C) * (2 / math.sqrt(C))
    score_bias = draw.tensor(B, 1, S, dtype=torch.float32) if data.draw(st.booleans()) else None
    assert_kernel("norm_scores", x, draw.row(B, C), draw.row(B, C), A, score_bias, 1e-5, heads, config=draw.config("norm_scores"))


@few
def test_gated_residual(data):
    draw = Draw(data)
    B, T, C = map(data.draw, (BATCHES, TOKENS, WIDTHS))
    S = data.draw(st.sampled_from([0, 1, 3, 16])) if T else 0
    mix = (draw.tensor(B, *T, S), draw.tensor(B, S, C)) if S else (None, None)
    residual, y = draw.tensor(B, *T, C), draw.tensor(B, *T, C)
    assert_kernel("gated_residual", residual, y, draw.row(B, C), *mix, config=draw.config("gated_residual"))


@few
def test_residual_norm(data):
    draw = Draw(data)
    B, T, C = map(data.draw, (BATCHES, TOKENS, WIDTHS))
    rows = (draw.row(B, C) for _ in range(3))
    assert_kernel("residual_norm", draw.tensor(B, *T, C), draw.tensor(B, *T, C), *rows, 1e-4, config=draw.config("residual_norm"))


@few
def test_ada_group_norm(data):
    draw = Draw(data)
    B, places = data.draw(BATCHES), data.draw(st.sampled_from([(), (2,), (5,), (3, 7), (16, 16), (31, 33), (2, 3, 5)]))
    groups, channels = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.sampled_from([2, 3, 10]))
    C, silu = groups * channels, data.draw(st.booleans())
    x, gamma, beta = draw.tensor(B, C, *places), draw.row(B, C), draw.row(B, C)
    assert_kernel("ada_group_norm", x, groups, gamma, beta, 1e-4, silu, config=draw.config("ada_group_norm"))


@few
def test_guidance_combine(data):
    draw = Draw(data)
    shape = (data.draw(BATCHES), *data.draw(st.sampled_from([(), (1,), (7,), (4, 9, 5), (1023,), (1024,), (1025,), (3, 1400)])))
    omega = 1 + 5 * draw.tensor(data.draw(st.sampled_from([1, shape[0]])), dtype=torch.float32)
    assert_kernel("guidance_combine", draw.tensor(*shape), draw.tensor(*shape), omega, config=draw.config("guidance_combine"))


@few
def test_guided_update(data):
    draw = Draw(data)
    shape = (data.draw(BATCHES), *data.draw(st.sampled_from([(), (1,), (7,), (4, 9, 5), (1024,), (1025,), (3, 1400)])))
    omega, *scales = (draw.tensor(data.draw(st.sampled_from([1, shape[0]])), dtype=torch.float32) for _ in "ωab")
    uncond, cond, sample = (draw.tensor(*shape) for _ in range(3))
    assert_kernel("guided_update", uncond, cond, omega, sample, *scales, config=draw.config("guided_update"))


def arguments(name, B=2, T=3, C=8, S=4, dtype=torch.float32):
    """Of every tensor that an op may have."""
    x, y, z = torch.randn(3, B, T, C).to(dtype)
    gate, gamma, beta = torch.randn(3, B, C).to(dtype)
    P, U, A = (torch.randn(*shape).to(dtype) for shape in ((B, T, S), (B, S, C), (B, S, C)))
    return {
        "ada_layer_norm": (x, gamma, beta),
        "norm_scores": (x, gamma, beta, A / max(C, 1) ** 0.5, torch.randn(B, 1, S), 1e-5, 2),
        "gated_residual": (x, y, gate, P, U),
        "residual_norm": (x, y, gate, gamma, beta),
        "ada_group_norm": (x.mT.contiguous(), 2, gamma, beta, 1e-5, True),
        "guidance_combine": (x, y, torch.rand(B) * 5),
        "guided_update": (x, y, torch.rand(B) * 5, z, torch.rand(B), torch.rand(1)),
    }[name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [{"B": 64}, {"B": 1, "T": 2, "C": 5120, "S": 16}, {"B": 1, "T": 1, "C": 4}, {"T": 200}], ids=str
)
@pytest.mark.parametrize("name", NAMES)
def test_sizes(name, sizes, dtype):
    for config in configs(name) if "T" in sizes else (None,):
        assert_kernel(name, *arguments(name, **sizes, dtype=dtype), config=config)


def test_norms_of_one_element_are_beta():
    x, gamma, beta = torch.randn(2, 3, 1), torch.randn(2, 1), torch.randn(2, 1)
    assert torch.equal(interpreted("ada_layer_norm", x, gamma, beta), beta[:, None].expand_as(x))
    assert torch.equal(interpreted("residual_norm", x, x, None, gamma, beta)[1], beta[:, None].expand_as(x))
    assert torch.equal(interpreted("norm_scores", x, gamma, beta, torch.randn(2, 1, 1))[1], torch.ones(2, 3, 1))
    rows = torch.randn(2, 6)
    assert torch.equal(interpreted("ada_group_norm", rows, 6, None, rows), rows)


@pytest.mark.parametrize("name", NORMS)
def test_norms_keep_the_digits_of_a_large_mean(name):
    """100 standard deviations away from 0, where E[x²] − mean² has none left in float32."""
    x, *others = arguments(name, T=5, C=1000)
    for config in configs(name):
        assert_kernel(name, 100 + x, *others, config=config)


def test_ada_group_norm_of_many_pieces():
    """More than a group may be cut into, so that a program takes several; the last piece is short."""
    x = (1 + torch.arange(2)[:, None]) * (100 + torch.randn(2, 64 * 1024 * 2 + 700))
    assert_kernel("ada_group_norm", x.view(1, 2, -1), 2, None, torch.randn(1, 2), config={"BLOCK": 1024, "num_warps": 4})


def test_ada_group_norm_of_channels_last_and_of_some_channels():
    x = torch.randn(2, 12, 5, 7)
    rows = torch.randn(2, 2, 8)
    assert_kernel("ada_group_norm", x[:, 2:10], 4, *rows, 1e-5, True)
    assert_kernel("ada_group_norm", x[:, 2:10].to(memory_format=torch.channels_last), 4, *rows, 1e-5, True)


def test_ada_group_norm_of_values_far_below_zero():
    assert_kernel("ada_group_norm", torch.randn(1, 2, 50), 1, torch.full((1, 2), 200.0), None, 1e-5, True)


def test_norm_scores_leave_masked_tokens_out():
    x, gamma, beta, A, score_bias, eps, heads = arguments("norm_scores", S=6)
    score_bias[:, :, [1, 5]] = -math.inf
    assert_kernel("norm_scores", x, gamma, beta, A, score_bias, eps, heads)
    assert not interpreted("norm_scores", x, gamma, beta, A, score_bias, eps, heads)[1][..., [1, 5]].any()


def test_norm_scores_of_a_head_whose_tokens_are_all_masked_leave_the_others():
    x, gamma, beta, A, score_bias, eps, heads = arguments("norm_scores", S=6)
    score_bias[:, :, :3] = -math.inf
    P, expected = (
        function(x, gamma, beta, A, score_bias, eps, heads)[1]
        for function in (lambda *args: interpreted("norm_scores", *args), OPS["norm_scores"].reference)
    )
    torch.testing.assert_close(P, expected, equal_nan=True)


def test_norm_scores_of_large_scores():
    """Whose exponentials overflow but for the maximum."""
    x, gamma, beta, A, *_ = arguments("norm_scores")
    assert_kernel("norm_scores", x, gamma, beta, 100 * A)


@pytest.mark.parametrize("sizes", [{"B": 0}, {"T": 0}, {"C": 0}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_empty(name, sizes):
    given = arguments(name, **sizes)
    if name == "norm_scores" and sizes == {"C": 0}:
        with pytest.raises(ValueError, match="norm_scores: x must have channels"):
            interpreted(name, *given)
        return
    found, shape = outputs(interpreted(name, *given)), given[0].shape
    assert [one.shape for one in found] == [shape, (*shape[:-1], 4) if name == "norm_scores" else shape][: len(found)]


ERRORS = {
    "ada_layer_norm": [({"gamma": torch.zeros(3, 8)}, "gamma must be"), ({"beta": torch.zeros(2, 8).half()}, "beta must be")],
    "norm_scores": [
        ({"A": torch.zeros(2, 4, 7)}, "A must be"),
        ({"score_bias": torch.zeros(2, 1, 4).half()}, "score_bias must be torch.float32"),
        ({"heads": 3}, "heads must divide the 4 scores, found 3"),
    ],
    "gated_residual": [
        ({"U": None}, "found P alone"),
        ({"P": None}, "found U alone"),
        ({"y": torch.zeros(2, 3, 7)}, "y must be"),
    ],
    "residual_norm": [({"y": torch.zeros(2, 4, 8)}, "y must be"), ({"gate": torch.zeros(2, 7)}, "gate must be")],
    "ada_group_norm": [
        ({"groups": 3}, "groups must divide the 8 channels, found 3"),
        ({"gamma": torch.zeros(2, 3)}, "gamma must be"),
    ],
    "guidance_combine": [({"cond": torch.zeros(2, 3, 7)}, "cond must be"), ({"omega": torch.zeros(3)}, "omega must be")],
    "guided_update": [
        ({"sample": torch.zeros(2, 3, 7)}, "sample must be"),
        ({"a": torch.zeros(3)}, "a must be"),
        ({"omega": torch.zeros(2).double()}, "omega must be torch.float32"),
    ],
}


@pytest.mark.parametrize(("name", "change", "message"), [(name, *case) for name in NAMES for case in ERRORS[name]])
def test_errors_name_the_argument(name, change, message):
    given = {**dict(zip(inspect.signature(OPS[name].reference).parameters, arguments(name), strict=False)), **change}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        OPS[name].kernel()(**given)


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_refused(name):
    with pytest.raises(ValueError, match="found torch.float64"):
        interpreted(name, *arguments(name, dtype=torch.float64))


@pytest.mark.parametrize("name", OPS)
def test_launchers_have_their_references_parameters(name):
    expected = list(inspect.signature(OPS[name].reference).parameters.values())
    *parameters, config = inspect.signature(OPS[name].kernel()).parameters.values()
    assert [(one.name, one.default) for one in parameters] == [(one.name, one.default) for one in expected]
    assert (config.name, config.kind, config.default) == ("config", inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize("name", OPS)
def test_the_package_gives_launchers_by_name(name):
    import agd_fast_kernels

    assert getattr(agd_fast_kernels, f"{name}_fwd") is OPS[name].kernel()
    assert f"{name}_fwd" in dir(agd_fast_kernels)


def test_the_package_needs_no_triton_until_a_launcher_is_asked_for():
    script = "import sys; sys.modules['triton'] = None; import agd_fast_kernels.shapes as s; s.require; hasattr(s, 'x')"
    subprocess.run([sys.executable, "-c", script], check=True)
    import agd_fast_kernels

    with pytest.raises(AttributeError, match="has no attribute 'nothing_fwd'"):
        _ = agd_fast_kernels.nothing_fwd


def in_need_of_gradients(name):
    return [arg.requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in arguments(name)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    torch.library.opcheck(OPS[name].overload, arguments(name))
    torch.library.opcheck(OPS[name].overload, tuple(in_need_of_gradients(name)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_references(name):
    given = in_need_of_gradients(name)
    tensors = [arg for arg in given if isinstance(arg, torch.Tensor)]

    def gradients(function):
        total = sum((one * one.cos()).sum() for one in outputs(function(*given)))
        return torch.autograd.grad(total, tensors)

    for found, expected in zip(gradients(OPS[name]), gradients(OPS[name].reference), strict=True):
        assert torch.equal(found, expected)
