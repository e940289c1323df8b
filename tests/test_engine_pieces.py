"""Blocks that repeat, compiled once: which pieces are found, what is not taken for the same, and that they give the same."""

import operator
import weakref
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import agd_fast as agd
from agd_fast.engine import engine_of, program
from agd_fast.engine.config import EngineConfig
from agd_fast.engine.pieces import Pieces
from agd_fast.graph.capture import capture, kind_of, schema_name
from agd_fast.graph.partition import part_of
from agd_fast.graph.repeats import calls_of
from conftest import assert_as_exact, make_dit
from helpers_engine import SCALE, in_pieces, own_forwards, programs
from helpers_pipelines import attach, model

WIDTH = 8
TOKENS = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Six operations left to libraries or not, of which four in a row in either place have an own weight."""

    def __init__(self, width=WIDTH, eps=1e-5, factor=2):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width, eps=eps), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.factor = factor

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))) * self.factor)


def stack(count, **options):
    torch.manual_seed(0)
    return nn.Sequential(*[Block(**options) for _ in range(count)])


def part_for(function, *inputs):
    """A function that gives a list, captured, and all of it as one part."""
    found = capture(function, inputs)
    (output,) = found.graph.find_nodes(op="output")
    return found, part_of([node for node in found.graph.nodes if node.op == "call_function"], output.args[0])


def split(function, *inputs):
    """The calls of a function's graph, which are checked to give what it gives, and to be of tensors of the same kind as those
    that their piece was made of; how often each piece is called."""
    found, part = part_for(function, *inputs)
    calls = calls_of(part.module.graph)
    values = {**found.constants, **dict(zip(found.inputs, (one.clone() for one in inputs), strict=True))}
    given = [values[node] for node in part.arguments]
    for call in calls:
        assert list(map(kind_of, call.arguments)) == list(map(kind_of, call.piece.graph.find_nodes(op="placeholder")))
    torch.manual_seed(1)
    expected = part.module.forward(*[one.clone() for one in given])
    torch.manual_seed(1)
    for one, own in zip(in_pieces(part, calls)(*given), expected, strict=True):
        assert torch.equal(one, own)
    return calls, sorted(Counter(call.piece for call in calls).values(), reverse=True)


def one(function):
    return lambda *inputs: [function(*inputs)]


# which pieces


def test_a_stack_of_blocks_is_one_piece_but_for_its_ends():
    calls, counts = split(one(stack(10)), TOKENS)
    assert counts == [9, 1, 1]
    first, *middle, last = calls
    assert len({call.piece for call in middle}) == 1 and first.piece is not last.piece
    names = [[schema_name(node) for node in call.piece.graph.nodes if node.op == "call_function"] for call in calls]
    assert names[1][0] == "aten::linear" and names[1].count("aten::linear") == 2
    for before, after in pairwise(names):
        assert "aten::linear" in (before[-1], after[0])  # where nothing is fused across


def test_pieces_of_several_kinds_one_after_another_and_in_turn():
    wide = nn.Linear(WIDTH, 2 * WIDTH)
    narrow = nn.Linear(2 * WIDTH, WIDTH)
    three = [stack(10), wide, stack(10, width=2 * WIDTH), narrow, stack(10)]
    _, counts = split(one(nn.Sequential(*three)), TOKENS)
    assert counts[:2] == [18, 9]
    long = [layer for _ in range(4) for layer in (*stack(8), nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    assert split(one(nn.Sequential(*long)), TOKENS)[1][0] == 28  # not what repeats 4 times, which holds what repeats 28 times
    double = [nn.Sequential(Block(), Block(factor=3)) for _ in range(8)]
    _, counts = split(one(nn.Sequential(*double)), TOKENS)
    assert counts == [7, 1, 1]


def test_what_does_not_repeat_or_saves_little_stays_whole():
    assert split(one(stack(3)), TOKENS)[1] == [1]
    assert split(one(nn.Sequential(*[Block(factor=n + 2) for n in range(10)])), TOKENS)[1] == [1]


@pytest.mark.parametrize("other", [{"eps": 1e-4}, {"factor": 2.0}, {"factor": 3}])
def test_blocks_that_differ_in_a_number_are_not_the_same(other):
    _, counts = split(one(nn.Sequential(*stack(10), Block(**other), *stack(10))), TOKENS)
    assert counts[0] in (18, 19) and sum(counts) - counts[0] >= 3


def test_blocks_of_another_dtype_shape_or_layout_are_not_the_same():
    class Turned(Block):
        def forward(self, x):
            return super().forward(x.mT).mT.contiguous()

    turned = nn.Sequential(*stack(12), *[Turned() for _ in range(12)])
    _, counts = split(one(turned), torch.randn(2, WIDTH, WIDTH))
    assert counts[:3] == [24, 11, 11]  # what is the same of both, and what is not
    single, wide = stack(12), stack(12).double()
    _, counts = split(lambda x: [wide(single(x).double())], TOKENS)
    assert counts[0] <= 12 and counts[1] >= 11


def test_what_a_block_is_given_twice_is_not_what_another_is_given_from_two():
    def run(x, y):
        for index, (into, out) in enumerate(blocks):
            x = x + out(F.gelu(into(x)) * (x if index < 10 else y))
        return [x]

    blocks = [(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(20)]
    _, counts = split(run, TOKENS, TOKENS.flip(0))
    assert counts[0] <= 10 and counts[1] >= 9


def test_what_some_blocks_give_to_others_far_off_is_given_by_these_alone():
    def run(x):
        kept = []
        for index, block in enumerate(blocks):
            hidden = F.gelu(block.up(block.norm(x)))
            x = x + block.down(hidden * 2)
            kept += [hidden] if 9 <= index < 18 else []
        return [x, *kept]

    blocks = stack(27)
    calls, counts = split(run, TOKENS)
    assert counts[:2] == [17, 9] and [len(call.results) for call in calls] == [1, *[2] * 9, *[3] * 9, *[2] * 8, 1]


# what must stay together


def test_memory_that_is_written_to_is_in_one_piece():
    def across(x):
        out = torch.zeros_like(x)
        for block in blocks:
            x = block(x)
            out.add_(x)
        return [x, out]

    blocks = stack(10)
    assert split(across, TOKENS)[1] == [1]

    def inside(x):
        for block in blocks:
            found = block.down(F.gelu(block.up(x)))
            out = torch.zeros_like(x)
            out[:, :2].copy_(found[:, :2])
            out.add_(x)
            x = block.norm(out)
        return [x]

    calls, counts = split(inside, TOKENS)
    assert counts[0] >= 8 and len(calls) > 8


def test_an_argument_that_is_written_to_is_written_to_once_in_order():
    def run(x, sums):
        for block in blocks:
            sums.add_(x)
            x = block(x)
        return [x, sums * 2]

    blocks = stack(10)
    assert split(run, TOKENS, torch.zeros_like(TOKENS))[1] == [1]


def test_lists_and_what_is_taken_of_them_stay_together():
    def run(x, rows):
        row, _ = rows.mul(2).chunk(2)
        for block in blocks:
            x = block(x) + row
        return [x]

    blocks = stack(10)
    _, part = part_for(run, TOKENS, torch.randn(2, WIDTH))
    graph = part.module.graph
    assert len(calls_of(graph)) > 1
    for item in graph.find_nodes(op="call_function", target=operator.getitem):
        for user in list(item.users):  # each takes it out of the list for itself
            with graph.inserting_before(user):
                user.replace_input_with(item, graph.node_copy(item))
    assert len(calls_of(graph)) == 1


def test_views_cross_a_cut():
    def run(x):
        whole = x.mul(2)
        rows = whole.mT.unflatten(1, (2, -1)).flatten(1, 2).mT[:, :1]
        for block in blocks:
            x = block(x) + rows
        return [x, rows]

    blocks = stack(10)
    assert split(run, TOKENS)[1][0] == 9


def test_random_numbers_are_drawn_in_order_and_by_pieces_of_their_own():
    def run(x):
        for block in blocks:
            x = block.down(F.dropout(F.gelu(block.up(block.norm(x))), 0.5, training=True))
        return [x]

    blocks = stack(10)
    calls, _ = split(run, TOKENS)
    drawn = [call.piece for call in calls if "dropout" in call.piece.code]
    assert len(drawn) == len(set(drawn))


@torch.no_grad()
def test_what_nobody_takes_any_more_is_let_go():
    found, part = part_for(one(stack(10)), TOKENS)
    made, alive = [], []

    def compile(piece, given):
        def run(*arguments):
            results = piece.forward(*arguments)
            made.extend(map(weakref.ref, results))
            alive.append(sum(reference() is not None for reference in made))
            return results

        return run

    values = {**found.constants, found.inputs[0]: TOKENS}
    Pieces(part, calls_of(part.module.graph), compile)(*[values[node] for node in part.arguments])
    assert len(alive) == 11 and max(alive) == 4  # what goes in and comes out: the residual stream, and what is beside it


def test_arguments_of_other_strides_have_pieces_of_their_own():
    found, part = part_for(one(stack(10)), TOKENS)
    compiled = []

    def compile(piece, given):
        compiled.append([one.stride() for one in given])
        return piece.forward

    pieces = Pieces(part, calls_of(part.module.graph), compile)
    values = {**found.constants, found.inputs[0]: TOKENS}
    given = [values[node] for node in part.arguments]
    first = pieces(*given)
    assert len(compiled) == 3
    turned = [one.mT.contiguous().mT if one is TOKENS else one for one in given]
    for _ in range(2):
        assert torch.equal(pieces(*turned)[0], first[0])
        assert torch.equal(pieces(*given)[0], first[0])
    assert len(compiled) >= 4 and all(one not in compiled[:3] for one in compiled[3:])


# on the engine


@pytest.fixture
def eagerly(monkeypatch):
    """Pieces run as they are; what they were made for."""
    compiled = []

    def by_nobody(mode):
        def compile(piece, given):
            compiled.append(piece)
            return piece.forward

        return compile

    monkeypatch.setattr(program, "by_inductor", by_nobody)
    return compiled


def deep(layers=6):
    this = model("dit")
    torch.manual_seed(0)
    this.denoiser = make_dit(layers)
    attach(this.denoiser)
    return this


def info(this):
    return agd.info(this.denoiser)["engine"]


@torch.no_grad()
def test_on_the_engine_they_give_what_the_whole_gives(eagerly):
    this = deep()
    agd.optimize(this.denoiser, EngineConfig(compile=False))
    this(SCALE)
    whole = this(SCALE)
    assert info(this)["repeated_blocks"] == {}
    agd.optimize(this.denoiser, EngineConfig(compile=True, repeated_blocks=True))
    this(SCALE)
    made = len(eagerly)
    with own_forwards(this.denoiser) as seen:
        assert torch.equal(this(SCALE), whole)
    assert not seen and len(eagerly) == made == 3
    assert info(this)["repeated_blocks"] == {"compiled": 3, "calls": 7} and not info(this)["slower_because"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("repeated_blocks", "layers", "expected"),
    [(None, 18, True), (None, 6, False), (False, 6, False), (True, 6, True), (True, 2, False)],
)
def test_where_blocks_are_compiled_once(monkeypatch, eagerly, repeated_blocks, layers, expected):
    monkeypatch.setattr(torch, "compile", lambda module, **options: module.forward)
    this = deep(layers)
    agd.optimize(this.denoiser, EngineConfig(compile=True, repeated_blocks=repeated_blocks))
    this(SCALE)
    assert bool(info(this)["repeated_blocks"]) == expected == bool(eagerly)


@torch.no_grad()
def test_where_pieces_cannot_be_compiled_all_of_a_step_is_and_then_nothing(monkeypatch):
    def fails(*args, **options):
        raise RuntimeError("no compiler")

    plain = deep()(SCALE)
    monkeypatch.setattr(program, "by_inductor", lambda mode: fails)
    whole = []
    for compile, expected in (
        (lambda module, **options: whole.append(module) or module.forward, "so all of a step is compiled"),
        (lambda module, **options: fails, "so steps run uncompiled"),
    ):
        monkeypatch.setattr(torch, "compile", compile)
        this = deep()
        agd.optimize(this.denoiser, EngineConfig(compile=True, repeated_blocks=True))
        torch.testing.assert_close(this(SCALE), plain)
        with pytest.warns(UserWarning, match="is optimized in part"):
            torch.testing.assert_close(this(SCALE), plain)
        (reason,) = info(this)["slower_because"]
        assert expected in reason and "no compiler" in reason and not info(this)["plain_because"]
        (one,) = programs(this.denoiser)
        assert not one.moving([0]).pieces  # not tried again
    assert whole


@torch.no_grad()
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_by_inductor_they_are_as_exact():
    this = deep()
    plain, reference = this(SCALE), this.exact()(SCALE)
    agd.optimize(this.denoiser, EngineConfig(compile=True, repeated_blocks=True))
    for _ in range(3):
        found = this(SCALE)
    assert info(this)["repeated_blocks"] == {"compiled": 3, "calls": 7} and not info(this)["slower_because"]
    (one,) = programs(this.denoiser)
    assert len(one.body.compiled) == 3  # strides are the same in all blocks
    assert engine_of(this.denoiser).recorded
    assert_as_exact(found, plain, reference)
