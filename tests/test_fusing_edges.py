"""Patterns at their edges: what looks like one and is none, what is written in place, layouts, and weights that are not plain."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from agd_fast import ops
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.program import Program
from agd_fast.graph.capture import capture
from agd_fast.graph.fusing import ELSEWHERE
from agd_fast.graph.levels import Level
from helpers_engine import assert_same
from helpers_fusing import B, C, T, as_list, check, norm, parameter, rewritten, row, x, y, z
from helpers_kernels import channels_last

# what is written in place: nothing that is read of it moves to where it holds something else


def projected_before_a_sum_is_written(x, y, z, weight):
    h = x + y
    n, projected = norm(h), F.linear(h, weight)
    h.mul_(z)
    return n, F.gelu(projected), h


def added_before_a_sum_is_written(x, y, z, weight):
    h = x + y
    n, total = norm(h), h + z
    h.mul_(z)
    return n, norm(total), h


def projected_before_a_norm_is_written(x, y, z, weight):
    n = norm(x + y)
    projected = F.linear(n, weight)
    n.mul_(z)
    return F.gelu(projected), n


def projected_before_a_gelu_is_written(x, y, z, weight):
    g = F.gelu(F.linear(x, weight))
    projected = F.linear(g, weight)
    g.mul_(z)
    return F.gelu(projected), g


def projected_before_a_modulated_norm_is_written(x, y, z, weight):
    n = norm(x) * (1 + y[:, :1])
    projected = F.linear(n, weight)
    n.mul_(z)
    return F.gelu(projected), n


def projected_before_a_norm_with_one_row_is_written(x, y, z, weight):
    n = norm(x) * (1 + y[:1, :1])
    projected = F.linear(n, weight)
    n.mul_(z)
    return F.gelu(projected), n


def projected_before_a_group_norm_is_written(x, y, z, weight):
    g = F.silu(F.group_norm(x, T))
    projected = F.linear(g, weight)
    g.mul_(z)
    return F.gelu(projected), g


def normed_before_a_norm_with_one_row_is_written(x, y, z, weight):
    first = norm(x) * (1 + y[:1, :1])
    second = norm(first)
    first.mul_(y)
    return second * (1 + z[:1, :1]), first


def scored_after_a_norm_is_written(x, y, z, weight):
    A, U, n = y[:, :3], z[:, :3], norm(x)
    output = F.linear(F.linear(n, weight).sin(), weight)
    n.view(-1).mul_(z.view(-1))
    return x + ops.absorbed_attention(n, output, A, U)


def scored_before_a_block_is_written(x, y, z, weight):
    A, U, n = y[:, :3], z[:, :3], norm(x)
    end = x + ops.absorbed_attention(n, F.linear(F.linear(n, weight).sin(), weight), A, U)
    projected = F.linear(end, weight)
    end.mul_(z)
    return F.gelu(projected), end


WRITTEN = [
    projected_before_a_sum_is_written,
    added_before_a_sum_is_written,
    projected_before_a_norm_is_written,
    projected_before_a_gelu_is_written,
    projected_before_a_modulated_norm_is_written,
    projected_before_a_norm_with_one_row_is_written,
    projected_before_a_group_norm_is_written,
    normed_before_a_norm_with_one_row_is_written,
    scored_after_a_norm_is_written,
    scored_before_a_block_is_written,
]


@torch.no_grad()
@pytest.mark.parametrize("policy", ["always", "never"])
@pytest.mark.parametrize("function", WRITTEN)
def test_what_is_read_before_a_write_is_read_before_it(function, policy):
    inputs = x, y, z, parameter(C, C)
    found, _ = rewritten(function, *inputs, policy=policy)
    for one, plain in zip(found, as_list(function(*inputs)), strict=True):
        torch.testing.assert_close(one, plain)


@torch.no_grad()
def test_what_is_not_written_runs_on_kernels_beside_what_is():
    def function(x, y, z, weight):
        written = projected_before_a_sum_is_written(x, y, z, weight)
        h = x + z
        return *written, norm(h), F.gelu(F.linear(h, weight)), h

    inputs = x, y, z, parameter(C, C)
    found, done = rewritten(function, *inputs)
    for one, plain in zip(found, function(*inputs), strict=True):
        torch.testing.assert_close(one, plain)
    assert done.kernels == {
        "kernels": {"residual_norm": 1, "activated_linear": 1},
        "not_on_kernels": {"activated_linear: tensors that are written in place": 1},
    }


# layouts


@pytest.mark.parametrize(
    "wide",
    [
        lambda q: q.view(B, T, 2, 4).view(B, T * 2, 4),
        lambda q: q.unflatten(-1, (2, 4)).view(B, T * 2, 4),
        lambda q: q.view(B, T, 2, 4).transpose(0, 1).transpose(0, 1).view(B, T * 2, 4),
    ],
)
def test_views_of_views_that_need_tokens_side_by_side_keep_projections_apart(wide):
    check(lambda x, w, v: (wide(F.linear(x, w)), F.linear(x, v) * 2), x, parameter(C, C), parameter(4, C), kernels={})


@pytest.mark.parametrize("heads", [lambda q: q.view(B, T, 2, 4).transpose(1, 2), lambda q: q.unflatten(-1, (2, 4)).movedim(1, 2)])
def test_heads_of_joined_projections_go_where_attention_takes_them(heads):
    def function(x, w, v):
        q = heads(F.linear(x, w))
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(B, T, C), F.linear(x, v).mul(2)

    check(function, x, parameter(C, C), parameter(4, C), kernels={}, joined=1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, g: (x.mT + g * y.mT).mT.view(B, -1),
        lambda x, y, g: (lambda h: (norm(h), h.mT.view(B, -1)))(x.mT + y.mT),
        lambda x, y, g: (norm(x.mT) * g).mT.reshape(B, -1),
    ],
)
def test_a_result_keeps_the_layout_that_is_viewed(function):
    inputs = torch.randn(B, C, T), torch.randn(B, C, T), row(B, 1, C)
    found, _ = rewritten(function, *inputs)
    for one, plain in zip(found, as_list(function(*inputs)), strict=True):
        torch.testing.assert_close(one, plain)


def normed(image, gamma, beta, weight):
    return F.silu(F.group_norm(image, 2) * (1 + gamma) + beta)


def convolved(*inputs):
    return F.conv2d(normed(*inputs), inputs[-1])


def in_rows(*inputs):
    """Which there is a view for where channels lie side by side."""
    return normed(*inputs).movedim(1, -1).view(len(inputs[0]), -1)


def in_planes(*inputs):
    """And here where they do not."""
    return normed(*inputs).view(len(inputs[0]), -1)


def to_be_normed(samples):
    image, rows = channels_last(torch.randn(samples, 8, 4, 6)), torch.randn(2, samples, 8, 1, 1)
    return image, *rows, channels_last(torch.randn(5, 8, 3, 3))


@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize("function", [normed, convolved, in_rows])
def test_group_norms_of_channels_side_by_side(function, samples):
    inputs = to_be_normed(samples)
    check(function, *inputs, kernels={"ada_group_norm": 1})
    assert rewritten(function, *inputs)[0][0].stride() == function(*inputs).stride()


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, B])
@pytest.mark.parametrize(("function", "fits"), [(convolved, True), (normed, False), (in_planes, False)])
def test_group_norms_that_torch_turns_round(function, fits, samples):
    """Contiguous of channels side by side, as on CUDA and here on the meta device: convolutions take either."""
    inputs = [one.to("meta") for one in to_be_normed(samples)]
    assert F.group_norm(inputs[0], 2).is_contiguous()
    found = rewritten(function, *inputs)[1].kernels
    put, left = {"ada_group_norm": 1}, {f"ada_group_norm: {ELSEWHERE}": 1}
    assert (found["kernels"], found["not_on_kernels"]) == ((put, {}) if fits else ({}, left))


def test_group_norms_of_some_channels_are_left_where_their_layout_is_asked_for():
    image, *rest = to_be_normed(B)
    inputs = torch.cat([image, image], dim=1)[:, 3:11], *rest
    check(convolved, *inputs, kernels={"ada_group_norm": 1})
    done = check(in_rows, *inputs, kernels={})
    assert done.kernels["not_on_kernels"] == {f"ada_group_norm: {ELSEWHERE}": 1}


@pytest.mark.parametrize("lasts", [*product([False, True], repeat=2)])
def test_low_rank_terms_of_images_of_any_layouts(lasts):
    images = [channels_last(one) if last else one for one, last in zip(torch.randn(2, B, 6, 4, 5), lasts, strict=True)]
    inputs = *images, torch.randn(2, 6), torch.randn(6, 2), torch.randn(B, 2)

    def function(hidden, output, down, up, gates):
        summed = ops.gated_lora(hidden, output, down, up, gates, True)
        return (summed.movedim(1, -1) if lasts[1] else summed).view(B, -1)

    check(function, *inputs, kernels={"gated_lora": 1})


def test_low_rank_terms_of_some_channels_are_left_where_their_layout_is_asked_for():
    whole = channels_last(torch.randn(B, 8, 4, 5))
    inputs = whole[:, 2:], whole[:, :6], torch.randn(2, 6), torch.randn(6, 2), channels_last(torch.randn(5, 6, 3, 3))

    def function(hidden, output, down, up, weight):
        return ops.gated_lora(hidden, output, down, up, None, True)

    check(lambda *given: F.conv2d(function(*given), given[-1]), *inputs, kernels={"gated_lora": 1})
    done = check(lambda *given: function(*given).movedim(1, -1).view(B, -1), *inputs, kernels={})
    assert done.kernels["not_on_kernels"] == {f"gated_lora: {ELSEWHERE}": 1}


# weights


def test_a_weight_of_one_row_without_its_dimension_is_left_alone():
    weight = parameter(C)
    check(lambda x, w, v: (F.linear(x, w) * 2, F.linear(x, v) * 2), x, parameter(16, C), weight, kernels={})
    check(lambda x, v: F.gelu(F.linear(x, v)), x, weight, kernels={})


def test_an_odd_number_of_features_has_no_halves():
    def function(x, weight):
        value, gate = F.linear(x, weight).chunk(2, dim=-1)  # [B, T, 2] and [B, T, 1]
        return value * F.gelu(gate)

    assert check(function, x, parameter(3, C), kernels={}).kernels["not_on_kernels"] == {}


def test_halves_of_another_dimension_are_left_alone():
    def function(x, weight):
        value, gate = F.linear(x, weight).chunk(2, dim=1)
        return value * F.gelu(gate)

    check(function, x[:, :6], parameter(12, C), kernels={})


# blocks of adapters


def block(output, heads=1, S=3, gate=None):
    """x + what an absorbed adapter adds to `output(n)` of the normed tokens n; its inputs."""

    def function(x, A, U, *weights):
        n = norm(x)
        mixed = ops.absorbed_attention(n, output(n, *weights), A, U, None, heads)
        return x + mixed if gate is None else mixed * gate + x

    return function, [x, torch.randn(B, heads * S, C), torch.randn(B, heads * S, C)]


def two_linears(n, w_in, w_out):
    return F.linear(F.linear(n, w_in).sin(), w_out)


def with_lora(n, w_in, w_out, down, up):
    attended = F.linear(n, w_in).sin()
    return F.linear(attended, w_out) + 0.5 * F.linear(F.linear(attended, down), up)


def test_few_scores_of_several_heads_ride_with_the_norm():
    function, inputs = block(two_linears, heads=2)
    check(function, *inputs, parameter(C, C), parameter(C, C), kernels={"norm_scores": 1, "gated_residual": 1})


def test_a_projection_with_lora_is_mixed_behind_it_or_left():
    weights = [parameter(C, C), parameter(C, C), parameter(2, C), parameter(C, 2)]
    function, inputs = block(with_lora)
    check(function, *inputs, *weights, kernels={"norm_scores": 1, "gated_residual": 1})
    function, inputs = block(with_lora, S=20)
    done = check(function, *inputs, *weights, kernels={})
    assert "projection_scores: no plain projection at the block's input or output" in done.kernels["not_on_kernels"]


def test_one_projection_is_not_computed_twice_for_its_scores():
    function, inputs = block(F.linear, S=20)
    check(function, *inputs, parameter(C, C), kernels={})


def test_a_gate_on_something_else_is_not_the_blocks():
    def function(x, y, gate, other, A, U, w_in, w_out):
        n = norm(x)
        return other * y + gate * ops.absorbed_attention(n, two_linears(n, w_in, w_out), A, U)

    inputs = [x, y, row(B, 1, C), row(B, 1, C), torch.randn(B, 3, C), torch.randn(B, 3, C), parameter(C, C), parameter(C, C)]
    found, _ = rewritten(function, *inputs)
    torch.testing.assert_close(found[0], function(*inputs))


@pytest.mark.parametrize("S", [3, 20])
def test_two_blocks_beside_one_another_share_a_norm(S):
    def function(x, A, U, other_A, other_U, *weights):
        n = norm(x)
        first = ops.absorbed_attention(n, two_linears(n, *weights[:2]), A, U)
        return x + first + ops.absorbed_attention(n, two_linears(n, *weights[2:]), other_A, other_U)

    tokens, weights = [torch.randn(B, S, C) for _ in range(4)], [parameter(C, C) for _ in range(4)]
    few = {"norm_scores": 1, "gated_residual": 1, "projection_scores": 1, "projection_mix": 1}
    check(function, x, *tokens, *weights, kernels=few if S == 3 else {"projection_scores": 2, "projection_mix": 2})


@pytest.mark.parametrize("late", [(), ("A",), ("A", "score_bias")])
def test_keys_that_are_made_behind_the_norm_are_there_when_they_are_needed(late):
    def function(x, A, U, score_bias, w_in, w_out):
        n = norm(x)
        output = two_linears(n, w_in, w_out)
        A = A.sin() + output[:, :20] if "A" in late else A
        score_bias = score_bias * output.mean() if "score_bias" in late else score_bias
        return x + ops.absorbed_attention(n, output, A, U, score_bias)

    tokens = torch.randn(B, 3, C), torch.randn(B, 3, C), torch.randn(B, 1, 3)
    inputs = [x, *tokens, parameter(C, C), parameter(C, C)]
    if late:
        inputs[1] = torch.randn(B, 7, C)
        inputs[2], inputs[3] = torch.randn(B, 7, C), torch.randn(B, 1, 7)
    check(function, *inputs, kernels={} if late else {"norm_scores": 1, "gated_residual": 1})


# levels: what is computed before a step is not put on kernels, as it is computed for all steps at once


@torch.no_grad()
def test_what_moves_with_the_step_alone_is_not_put_on_kernels():
    weight, up = parameter(C, C), parameter(4 * C, C)

    def function(c, t, x):
        rows = c * t.sin()  # [B, T, C]
        rows = norm(rows + (1 + t) * rows.cos()) * (1 + rows[:, :1]) + rows[:, 1:2]
        rows = F.gelu(F.linear(rows, up)).chunk(4, dim=-1)[0] + t * rows
        return F.gelu(F.linear(x, weight)) + rows

    c, t = torch.randn(B, T, C), torch.full((B, 1, C), 0.5)
    found = capture(lambda *given: [function(*given)], [c, t, x])
    program = Program(found, [Level.STATIC, Level.STEP, Level.MOVING], 1, EngineConfig(kernels="always"))
    assert program.rewritten.kernels == {"kernels": {"activated_linear": 1}, "not_on_kernels": {}}
    for part in (program.parts.once, program.parts.step):
        assert not any("agd_fast_kernels" in str(node.target) for node in part.module.graph.nodes)
    for value in (0.5, 0.2):
        given = [c, torch.full((B, 1, C), value), x]
        assert_same(program.run(given, program.prepare(given))[0], function(*given))
