"""Kernels of norms, residuals and guidance, interpreted: any size and layout, every optional argument and configuration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_fast.ops import OPS
from helpers_kernels import arguments, assert_kernel, channels_last, configs, interpreted, made, outputs

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
    x = channels_last(x) if data.draw(st.booleans()) else x
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
    layouts = (torch.Tensor.contiguous, channels_last) if name == "ada_group_norm" else (torch.Tensor.contiguous,)
    for config in configs(name):
        for layout in layouts:
            assert_kernel(name, layout(100 + x), *others, config=config)


def test_ada_group_norm_of_many_pieces():
    """More than a group may be cut into, so that a program takes several; the last piece is short."""
    x = (1 + torch.arange(2)[:, None]) * (100 + torch.randn(2, 64 * 1024 * 2 + 700))
    assert_kernel("ada_group_norm", x.view(1, 2, -1), 2, None, torch.randn(1, 2), config={"BLOCK": 1024, "num_warps": 4})


def test_ada_group_norm_of_some_channels_and_of_some_samples():
    x = torch.randn(3, 12, 5, 7)
    rows = torch.randn(2, 2, 8)
    for image in (x, channels_last(x)):
        assert_kernel("ada_group_norm", image[1:, 2:10], 4, *rows, 1e-5, True)
        assert_kernel("ada_group_norm", image[1:], 4, None, None)


@pytest.mark.parametrize(
    ("groups", "size"), [(33, 1), (65, 2), (5, 5), (33, 10), (5, 20), (5, 30), (3, 40), (3, 60), (2, 80), (2, 150)]
)
def test_ada_group_norm_of_groups_side_by_side(groups, size):
    """Several whole groups a program, of any number of channels; the last program has fewer."""
    x = channels_last((torch.rand(groups * size) * torch.randn(1, 5, 7, groups * size)).movedim(-1, 1)).half()
    rows = torch.randn(2, 1, groups * size).half()
    assert_kernel("ada_group_norm", x, groups, *rows, 1e-5, True, config=configs("ada_group_norm")[size % 3])


def test_ada_group_norm_of_many_pieces_side_by_side():
    """More places than there are tiles for in one round, so that a program takes several; the last piece is short."""
    x = channels_last(100 + (1 + torch.arange(160)).view(1, -1, 1, 1) * torch.randn(1, 160, 40, 41))
    assert_kernel("ada_group_norm", x, 2, None, torch.randn(1, 160), config={"BLOCK": 1024, "num_warps": 4})


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
