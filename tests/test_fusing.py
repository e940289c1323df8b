"""Pieces of a graph on kernels: found where they are, left where they are not, with the same numbers. On a CPU references run."""

import pytest
import torch
from torch.nn import functional as F

from agd_fast import ops
from helpers_fusing import B, C, T, attention, check, norm, parameter, rewritten, row, x, y


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "modulated",
    [
        lambda n, g, b: n * (1 + g) + b,
        lambda n, g, b: b + g * n,
        lambda n, g, b: torch.addcmul(n, n, g),
        lambda n, g, b: n + torch.addcmul(b, n, g),
        lambda n, g, b: n + b[:1],
    ],
)
def test_layer_norms_take_a_row_of_each_sample(modulated, affine):
    gamma, beta = row(B, 1, C), row(B, 1, C)
    weights = (parameter(C), parameter(C)) if affine else ()
    kernels = {"ada_layer_norm": 1} if modulated(torch.ones(B, T, C), gamma, beta).shape and _batched(modulated) else {}
    check(lambda x, g, b, *own: modulated(norm(x, *own), g, b), x, gamma, beta, *weights, kernels=kernels)


def _batched(modulated):
    """Whether any row is another from sample to sample: with the same for all, PyTorch's own norm takes it."""
    ones = torch.ones(B, T, C)
    same, rows = torch.zeros(B, 1, C), torch.arange(B, dtype=torch.float32).view(B, 1, 1).expand(B, 1, C)
    return not torch.equal(modulated(ones, rows, same), modulated(ones, rows[:1].expand_as(rows), same)) or not torch.equal(
        modulated(ones, same, rows), modulated(ones, same, rows[:1].expand_as(rows))
    )


def test_rows_that_come_from_the_norm_itself_are_not_folded():
    check(lambda x: norm(x) * norm(x).mean(1, keepdim=True), x, kernels={})


@pytest.mark.parametrize("rows", [False, True])
def test_group_norms_take_rows_and_the_silu(rows):
    image = torch.randn(B, 8, 4, 4)
    weight, bias, gamma, beta = parameter(8), parameter(8), row(B, 8, 1, 1), row(B, 8, 1, 1)

    def function(x, weight, bias, gamma, beta):
        n = F.group_norm(x, 2, weight, bias)
        return F.silu(n * (1 + gamma) + beta if rows else n)

    check(function, image, weight, bias, gamma, beta, kernels={"ada_group_norm": 1})
    check(lambda x, w, b: F.group_norm(x, 2, w, b), image, weight, bias, kernels={})


@pytest.mark.parametrize("gated", [lambda x, y, g: x + g * y, lambda x, y, g: y * g + x, lambda x, y, g: x + y])
def test_sums_and_the_norms_behind_them_are_one_pass(gated):
    weight, bias = parameter(C), parameter(C)

    def function(x, y, gate, weight, bias):
        h = gated(x, y, gate)
        return norm(h, weight, bias).relu() + h  # the next residual

    check(function, x, y, row(B, 1, C), weight, bias, kernels={"residual_norm": 1})


def test_a_sum_and_its_norm_with_rows_of_each_sample_are_one_pass():
    rows = [row(B, 1, C) for _ in range(3)]
    check(lambda x, y, g, s, b: norm(x + g * y) * (1 + s) + b, x, y, *rows, kernels={"residual_norm": 1})


def test_a_sum_that_something_else_takes_first_stays():
    def function(x, y):
        h = x + y
        other = h.relu()
        return norm(h), other

    check(function, x, y, kernels={})


def test_a_gate_without_a_norm_is_one_pass_and_a_bare_sum_stays():
    check(lambda x, y, g: x + g * y, x, y, row(B, 1, C), kernels={"gated_residual": 1})
    check(lambda x, y: x + y, x, y, kernels={})
    check(lambda x, y, g: (x + g * y, g * y), x, y, row(B, 1, C), kernels={})  # of which the product is wanted too


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_gelu_joins_its_projection(approximate, bias):
    weights = (parameter(12, C), parameter(12)) if bias else (parameter(12, C),)
    check(lambda x, *w: F.gelu(F.linear(x, *w), approximate=approximate), x, *weights, kernels={"activated_linear": 1})


def geglu(order):
    def function(x, weight, bias):
        value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
        return {"ab": value * F.gelu(gate), "ba": F.gelu(gate) * value, "swapped": gate * F.gelu(value)}[order]

    return function


@pytest.mark.parametrize(("order", "kernels"), [("ab", 1), ("ba", 1), ("swapped", 0)])
def test_geglu_joins_its_projection(order, kernels):
    expected = {"activated_linear": kernels} if kernels else {}
    check(geglu(order), x, parameter(12, C), parameter(12), kernels=expected)


def test_a_projection_that_is_used_twice_keeps_its_gelu_apart():
    def function(x, weight):
        z = F.linear(x, weight)
        return F.gelu(z) + z

    check(function, x, parameter(12, C), kernels={})


@pytest.mark.parametrize("first", [False, True])
def test_low_rank_terms_are_one_pass(first):
    hidden, output = (torch.randn(B, 6, 4, 4), torch.randn(B, 5, 4, 4)) if first else (torch.randn(B, T, 6), torch.randn(B, T, 5))
    check(
        lambda h, o, d, u, s: ops.gated_lora(h, o, d, u, s, first),
        *(hidden, output, torch.randn(2, 6), torch.randn(5, 2), torch.randn(B, 2)),
        kernels={"gated_lora": 1},
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("S", "plain_norm", "kernels"),
    [
        (3, True, {"norm_scores": 1, "gated_residual": 1}),
        (3, False, {"projection_scores": 1, "projection_mix": 1}),
        (79, True, {"projection_scores": 1, "projection_mix": 1}),
    ],
)
def test_absorbed_attention_joins_its_block(S, plain_norm, kernels, masked, gated):
    function, inputs = attention(S, masked=masked, gated=gated, plain_norm=plain_norm)
    check(function, *inputs, kernels=kernels)


def test_absorbed_attention_with_too_many_tokens_or_heads_stays_and_says_so():
    function, inputs = attention(129)
    done = check(function, *inputs, kernels={})
    assert "projection_scores: 129 scores a token, more than 128" in done.kernels["not_on_kernels"]
    function, inputs = attention(20, heads=2)
    done = check(function, *inputs, kernels={})
    assert "projection_scores: 2 heads, more than 1" in done.kernels["not_on_kernels"]


def test_absorbed_attention_behind_something_else_than_a_projection_stays_and_says_so():
    def function(x, A, U):
        return ops.absorbed_attention(x, x.sin(), A, U)

    done = check(function, x, torch.randn(B, 20, C), torch.randn(B, 20, C), kernels={})
    assert "no plain projection" in str(done.kernels["not_on_kernels"])


@pytest.mark.parametrize("bias", [False, True])
def test_thin_projections_ride_along(bias):
    weights = [parameter(C, C), parameter(4, C)] + ([parameter(C)] if bias else [])
    check(
        lambda x, wide, thin, *b: (F.linear(x, wide, *b).view(B, T, 2, 4).transpose(1, 2), F.linear(x, thin) * 2),
        *(x, *weights),
        kernels={},
        joined=1,
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda x, wide, thin: (F.linear(x, wide).view(-1, C), F.linear(x, thin) * 2),  # the tokens must lie side by side
        lambda x, wide, thin: (F.linear(x, wide) * 2, F.linear(x, wide[:5]) * 2),  # not thin
        lambda x, wide, thin: (F.linear(x, wide) * 2, F.linear(x.sin(), thin) * 2),  # other tokens
        lambda x, wide, thin: (F.linear(x, wide) * 2, F.linear(x, thin[:3]) * 2),  # rows that begin anywhere
    ],
)
def test_other_projections_stay_apart(function):
    check(function, x, parameter(C, C), parameter(4, C), kernels={}, joined=0)


def test_what_is_written_in_place_is_left_alone_and_the_rest_is_not():
    def function(x, y, weight, other):
        h = x + 0.5
        z = F.gelu(F.linear(h, weight))  # h is written to before it is used again
        h.mul_(2)
        return z + F.linear(h, weight), F.gelu(F.linear(y, other))

    done = rewritten(function, x, y, parameter(C, C), parameter(5, C))[1]
    assert done.kernels["kernels"] == {"activated_linear": 1}
    assert done.kernels["not_on_kernels"] == {"activated_linear: tensors that are written in place": 1}


@torch.no_grad()
def test_in_place_graphs_have_the_right_numbers():
    weight, other = parameter(C, C), parameter(5, C)

    def function(x, y, weight, other):
        h = x + 0.5
        z = F.gelu(F.linear(h, weight))
        h.mul_(2)
        return z + F.linear(h, weight), F.gelu(F.linear(y, other))

    found, _ = rewritten(function, x, y, weight, other)
    for one, plain in zip(found, function(x, y, weight, other), strict=True):
        torch.testing.assert_close(one, plain)


def test_rows_that_are_written_in_place_are_read_where_they_were():
    def gate(x, y, g):
        g = g + 0.5
        h = x + g * y
        g.add_(1)
        return norm(h) + g

    def shift(x, b):
        b = b + 0.5
        n = norm(x) + b
        b.add_(1)
        return n * b

    for function, inputs in ((gate, (x, y, row(B, 1, C))), (shift, (x, row(B, 1, C)))):
        found, done = rewritten(function, *inputs)
        torch.testing.assert_close(found[0], function(*inputs))
        assert done.kernels["kernels"] == {}


def test_arguments_that_no_op_takes_are_left_alone():
    def function(x, y, gate):
        return x.double() + gate.double() * y.double()

    done = check(function, x, y, row(B, 1, C), kernels={})
    assert "gated_residual: torch.float64 tensors" in done.kernels["not_on_kernels"]


@pytest.mark.parametrize(("policy", "left"), [("never", {}), ("auto", {"gated_residual: tensors on cpu": 1})])
def test_other_policies_leave_a_graph_on_the_cpu_as_it_is(policy, left):
    done = rewritten(lambda x, y, g: x + g * y, x, y, row(B, 1, C), policy=policy)[1]
    assert done.kernels == {"kernels": {}, "not_on_kernels": left}
