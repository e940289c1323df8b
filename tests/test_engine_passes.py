"""The passes of the engine, one by one: what depends on what, the three parts, what is folded and joined."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from agd_fast.engine.config import EngineConfig
from agd_fast.engine.program import Program
from agd_fast.graph.capture import NotCapturableError, capture, schema_name
from agd_fast.graph.folding import drop_needless, fold_into_norms
from agd_fast.graph.joining import join_equal_cats
from agd_fast.graph.levels import Level, levels_of
from agd_fast.graph.partition import partition
from conftest import assert_as_exact
from helpers_engine import assert_same

STATIC, STEP, MOVING = Level.STATIC, Level.STEP, Level.MOVING


def captured(function, *inputs):
    return capture(lambda *given: [function(*given)], inputs)


def levels(function, inputs, given):
    """The level of every operation, by name."""
    found = captured(function, *inputs)
    level = levels_of(found.graph, dict(zip(found.inputs, given, strict=True)))
    return {schema_name(node): level[node] for node in found.graph.nodes if node.op == "call_function"}


def names(graph):
    return [schema_name(node).removeprefix("aten::") for node in graph.nodes if node.op == "call_function"]


def run_graph(found, inputs):
    module = torch.fx.GraphModule({}, found.graph)
    return module(*inputs, *found.constants.values())


# capture


def test_a_captured_forward_is_a_function_of_its_inputs_with_the_weights_as_they_are():
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    found = captured(linear, x)
    assert {id(one) for one in found.constants.values()} == {id(one) for one in linear.parameters()}
    with torch.no_grad():
        linear.weight.mul_(2)
        assert_same(run_graph(found, [x])[0], linear(x))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, "cannot be recorded"),
        (lambda x: x * float(x.numpy()[0]), "cannot be recorded"),
    ],
)
def test_what_cannot_be_captured_says_why(function, message):
    with pytest.raises(NotCapturableError, match=message):
        captured(function, torch.randn(4))


def test_gradients_that_a_forward_switches_on_are_not_lost():
    @torch.enable_grad()
    def function(x):
        return x.sin()

    assert names(captured(function, torch.randn(4)).graph) == ["sin"]
    with torch.no_grad(), pytest.raises(NotCapturableError, match="switches gradients on"):
        captured(function, torch.randn(4))


# levels


def test_an_operation_depends_on_the_most_moving_of_its_arguments():
    found = levels(lambda c, t, x: (c.exp() * t.sin()).cos() + x, [torch.randn(3) for _ in range(3)], [STATIC, STEP, MOVING])
    assert found == {"aten::exp": STATIC, "aten::sin": STEP, "aten::mul": STEP, "aten::cos": STEP, "aten::add": MOVING}


def test_what_is_written_in_place_has_one_level_with_all_its_views():
    def function(c, x):
        place = c.exp()
        place[0].copy_(x)
        return place.sin()

    found = levels(function, [torch.ones(2, 3), torch.ones(3)], [STATIC, MOVING])
    assert found["aten::exp"] == found["aten::sin"] == MOVING


def test_a_write_to_an_input_happens_at_every_step():
    assert levels(lambda c: (c.add_(1), c.exp())[1], [torch.ones(3)], [STATIC])["aten::exp"] == MOVING

    def beside(c):
        h = c.exp()
        torch._foreach_add_([h, c], 1.0)
        return h.sin()

    assert levels(beside, [torch.ones(3)], [STATIC])["aten::sin"] == MOVING


def test_random_numbers_move():
    assert levels(lambda c: torch.rand_like(c) + c.exp(), [torch.ones(3)], [STATIC])["aten::rand_like"] == MOVING


def test_attention_moves_as_its_inputs_do_unless_it_drops_some():
    attend, c = F.scaled_dot_product_attention, torch.ones(1, 1, 3, 4)
    for call in (lambda c: attend(c, c, c).exp(), lambda c: attend(c, c, c, None, 0.0, True).exp()):
        assert levels(call, [c], [STATIC])["aten::exp"] == STATIC
    for call in (lambda c: attend(c, c, c, None, 0.1).exp(), lambda c: attend(c, c, c, dropout_p=0.1).exp()):
        assert levels(call, [c], [STATIC])["aten::exp"] == MOVING


def test_a_cast_to_the_dtype_of_what_moves_does_not_move():
    for c in (torch.ones(3), torch.ones(3, dtype=torch.float64)):
        found = levels(lambda c, x: c.type_as(x).exp() * x, [c, torch.ones(3)], [STATIC, MOVING])
        assert found["aten::exp"] == STATIC
    x = torch.ones(3, requires_grad=False)
    assert levels(lambda x: x.type_as(x).exp(), [x], [MOVING])["aten::exp"] == MOVING


# partition


def written_beside_what_moves(c, t, x):
    still, moving = c.exp(), x * t
    torch._foreach_mul_([moving, still], 2.0)
    return still.sin() @ moving


FUNCTIONS = {
    "three levels": lambda c, t, x: (c.exp() * t.sin()) @ x + c.cos() @ x,
    "views of the step": lambda c, t, x: sum(piece @ x for piece in (c * t.sin()).chunk(3, dim=0)) + (c * t).mT.mT @ x,
    "written in place": lambda c, t, x: torch.cat([c.exp() * t, c]).mul_(2)[:3] @ x.clone().add_(t),
    "the output does not move": lambda c, t, x: c.exp() * t,
    "the output is an input": lambda c, t, x: x,
    "read before it is written": lambda c, t, x: (lambda h: (h * t) @ x + h.mul_(2) @ x)(c.exp()),
    "viewed before it is written": lambda c, t, x: (lambda h: (lambda v: (v * t) @ x + h.mul_(2) @ x)(h.mT))(c.exp()),
    "written beside what moves": written_beside_what_moves,
    "dead operations": lambda c, t, x: (c.exp(), x * t)[1],
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("given", [(STATIC, STEP, MOVING), (MOVING, STEP, MOVING), (STEP, STEP, MOVING)])
def test_a_forward_in_three_parts_is_the_forward(name, given):
    inputs = [torch.randn(3, 3), torch.tensor(0.7), torch.randn(3, 3)]
    expected = FUNCTIONS[name](*inputs)
    found = captured(FUNCTIONS[name], *inputs)
    parts = partition(found.graph, dict(zip(found.inputs, given, strict=True)))
    values = dict(zip(found.inputs, inputs, strict=True))
    for part in (parts.once, parts.step, parts.views):
        values.update(zip(part.results, part(values), strict=True))
    assert torch.allclose(parts.body(values)[0], expected)


def test_only_what_is_needed_above_leaves_a_part():
    found = captured(lambda c, t, x: ((c.exp() + 1) * t.sin()).cos() @ x, torch.ones(3, 3), torch.tensor(0.7), torch.ones(3, 3))
    parts = partition(found.graph, dict(zip(found.inputs, (STATIC, STEP, MOVING), strict=True)))
    assert [len(part.results) for part in (parts.once, parts.step)] == [1, 1]
    assert names(parts.body.module.graph) == ["matmul"]


def test_pieces_of_one_tensor_are_stored_once():
    found = captured(
        lambda c, t, x: (lambda a, b: a @ x + b @ x)(*(c * t).chunk(2)), torch.ones(6, 3), torch.tensor(0.7), torch.ones(3, 3)
    )
    parts = partition(found.graph, dict(zip(found.inputs, (STATIC, STEP, MOVING), strict=True)))
    assert len(parts.step.results) == 1 and len(parts.views.results) == 2


# folding


def test_operations_that_change_nothing_are_dropped():
    x = torch.randn(3)
    found = captured(lambda x: ((x / 1.0) * 1 + 0 - 0.0).exp(), x)
    drop_needless(found.graph)
    assert names(found.graph) == ["exp"]
    assert torch.equal(run_graph(found, [x])[0], x.exp())


def test_operations_that_change_the_dtype_are_kept():
    found = captured(lambda x: x * 1.0, torch.arange(3))
    drop_needless(found.graph)
    assert run_graph(found, [torch.arange(3)])[0].dtype == torch.float32


def layer_norm(form, affine):
    norm = nn.LayerNorm(6, elementwise_affine=affine)
    return norm, {
        "adaLN": lambda x, a, b: norm(x) * (1 + a[:, None]) + b[:, None],
        "scale": lambda x, a, b: norm(x) * a[:, None],
        "shift": lambda x, a, b: norm(x) + b[:, None],
        "addcmul": lambda x, a, b: torch.addcmul(norm(x), norm(x), a[:, None]),
        "affine": lambda x, a, b: (lambda n: n + torch.addcmul(b[:, None], n, a[:, None]))(norm(x)),
        "twice": lambda x, a, b: (norm(x) * (1 + a[:, None]) + b[:, None]) * (1 + b[:, None]) + a[:, None],
    }[form]


def folded(function, x, a, b):
    found = captured(function, x, a, b)
    placeholders = dict(zip(found.inputs, (MOVING, STEP, STEP), strict=True))
    before = len(partition(found.graph, placeholders).body.module.graph.nodes)
    drop_needless(found.graph)
    fold_into_norms(found.graph, levels_of(found.graph, placeholders))
    found.graph.eliminate_dead_code()
    after = len(partition(found.graph, placeholders).body.module.graph.nodes)
    return run_graph(found, [x, a, b])[0], after < before


def randomized(norm):
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("form", ["adaLN", "scale", "shift", "affine", "twice"])
def test_scales_and_shifts_are_folded_into_layer_norms(form, affine, dtype):
    norm, function = layer_norm(form, affine)
    randomized(norm).to(dtype)
    x, a, b = torch.randn(1, 4096, 6).to(dtype), torch.randn(1, 6).to(dtype), torch.randn(1, 6).to(dtype)
    found, smaller = folded(function, x, a, b)
    assert smaller
    plain = function(x, a, b)
    norm.double()
    assert_as_exact(found, plain, function(x.double(), a.double(), b.double()))


@torch.no_grad()
def test_rows_of_another_dtype_than_the_norms_weight_stay_behind_it():
    norm, row = nn.LayerNorm(6, bias=False), torch.randn(1, 6).bfloat16()
    x = torch.randn(1, 5, 6).bfloat16()
    found, smaller = folded(lambda x, a, b: norm(x) + b[:, None], x, row, row)
    assert not smaller and torch.equal(found, norm(x) + row[:, None])


@torch.no_grad()
def test_rows_of_several_samples_stay_behind_layer_norms():
    _, function = layer_norm("adaLN", True)
    x, a, b = torch.randn(2, 5, 6), torch.randn(2, 6), torch.randn(2, 6)
    found, smaller = folded(function, x, a, b)
    assert not smaller
    assert torch.allclose(found, function(x, a, b), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_all_samples_are_folded_into_group_norms(batch, dtype):
    norm = randomized(nn.GroupNorm(2, 6)).to(dtype)

    def function(x, a, b):
        n = norm(x)
        return n + torch.addcmul(b[..., None, None], n, a[..., None, None])

    x, a, b = torch.randn(batch, 6, 16, 16).to(dtype), torch.randn(batch, 6).to(dtype), torch.randn(batch, 6).to(dtype)
    found, smaller = folded(function, x, a, b)
    assert smaller
    plain = function(x, a, b)
    norm.double()
    assert_as_exact(found, plain, function(x.double(), a.double(), b.double()))


@torch.no_grad()
def test_a_norm_that_something_else_reads_is_not_folded():
    norm = randomized(nn.LayerNorm(6))

    def function(x, a, b):
        n = norm(x)
        return n * a[:, None] + n.exp()

    x, a, b = torch.randn(1, 5, 6), torch.randn(1, 6), torch.randn(1, 6)
    found, _ = folded(function, x, a, b)
    assert torch.allclose(found, function(x, a, b), atol=1e-6)


@torch.no_grad()
def test_rows_that_move_with_x_are_not_folded():
    norm = randomized(nn.LayerNorm(6))

    def function(x, a, b):
        return norm(x) * x.mean(dim=1, keepdim=True) + b[:, None]

    x, a, b = torch.randn(1, 5, 6), torch.randn(1, 6), torch.randn(1, 6)
    found, _ = folded(function, x, a, b)
    assert torch.allclose(found, function(x, a, b), atol=1e-6)


# joining


@torch.no_grad()
def test_rows_of_which_few_move_are_joined_at_once():
    def function(c, t, x):
        rows = [torch.cat([t[:, None] * (i + 1), c * (i + 2)], dim=1) for i in range(3)]
        for row in rows:
            x = x + (x @ row.mT).softmax(-1) @ row
        return x

    inputs = [torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 3, 4)]
    expected, found = function(*inputs), captured(function, *inputs)
    placeholders = dict(zip(found.inputs, (STATIC, STEP, MOVING), strict=True))
    kept = join_equal_cats(found.graph, levels_of(found.graph, placeholders))
    found.graph.eliminate_dead_code()
    assert names(found.graph).count("cat") == len(kept) == 1
    assert torch.allclose(run_graph(found, inputs)[0], expected, atol=1e-6)
    parts = partition(found.graph, placeholders, kept)
    assert sum(node.meta["val"].numel() for node in parts.step.results) <= 3 * 2 * 4  # the keys of t alone


@torch.no_grad()
def test_rows_of_which_one_needs_another_are_left_as_they_are():
    def function(c, t, x):
        row = torch.cat([t[:, None], c], dim=1)
        other = torch.cat([row.mean(dim=1, keepdim=True), c], dim=1)
        return x @ row.mT + x @ other.mT

    inputs = [torch.randn(2, 5, 4), torch.randn(2, 4), torch.randn(2, 3, 4)]
    expected, found = function(*inputs), captured(function, *inputs)
    placeholders = dict(zip(found.inputs, (STATIC, STEP, MOVING), strict=True))
    join_equal_cats(found.graph, levels_of(found.graph, placeholders))
    assert names(found.graph).count("cat") == 2
    assert torch.allclose(run_graph(found, inputs)[0], expected, atol=1e-6)


# writing in place


def read_before_and_after_a_write(t, x):
    b = x * 2
    before = b.sum(1)
    b[:, :3] = 0
    return before - 2 * b.sum(1) + t


def kept_by_a_product_with_one(t, x):
    b = x + t
    kept = b * 1.0
    b[:, :3] = 0
    return kept + b


def kept_by_a_copy(t, x):
    b = x + t
    written = b.to(torch.float32, copy=True)
    written[:, :3] = 0
    return b + written


def written_for_the_step(t, x):
    b = torch.zeros(4)
    before = b + 1
    b[:2] = t
    return x * before.sum() + b.sum() + torch.zeros(4).sum()


def rows_that_do_not_lie_contiguously(t, x):
    e = (t.view(1, 1, 1) * torch.arange(24.0).view(2, 4, 3).transpose(1, 2)).sin()
    return e.transpose(1, 2).view(2, 12).sum() + x


def equal_operations(t, x):
    return t.sin() + x * t.sin() + F.dropout(x, 0.5, training=False) / 1.0


WRITING = [read_before_and_after_a_write, kept_by_a_product_with_one, kept_by_a_copy, written_for_the_step]


@pytest.mark.parametrize("function", [*WRITING, rows_that_do_not_lie_contiguously, equal_operations])
@torch.no_grad()
def test_a_program_is_its_function(function):
    t, x = torch.tensor([0.5]), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    program = Program(captured(function, t, x), [STEP, MOVING], 0, EngineConfig())
    for t in (torch.tensor([0.7]), torch.tensor([0.2])):
        assert_same(program.run([t, x], program.prepare([t, x]))[0], function(t, x))
