"""Small functions rewritten for kernels: what they give, and what became of them."""

import math

import torch
from torch import fx, nn
from torch.nn import functional as F

from agd_fast import ops
from agd_fast.graph.capture import capture, value_of
from agd_fast.graph.levels import Level, leading_to
from agd_fast.graph.partition import part_of
from agd_fast.graph.rewriting import rewrite
from conftest import assert_as_exact

B, T, C = 3, 7, 8


def as_list(found):
    return list(found) if isinstance(found, tuple) else [found]


def concatenated(graph, constants, pieces):
    """One more constant, as the engine makes it: weights, and zeros of a length, joined."""
    results = [piece for piece in pieces if isinstance(piece, fx.Node)]
    values = part_of([node for node in leading_to(results) if node.op == "call_function"], results)(constants)
    rest = iter(values)
    joined = torch.cat([values[0].new_zeros(piece) if isinstance(piece, int) else next(rest) for piece in pieces])
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(f"joined_{len(constants)}")
    node.meta["val"] = value_of(results[0]).fake_mode.from_tensor(joined)
    constants[node] = joined
    return node


def rewritten(function, *inputs, policy="always", **options):
    """What a rewritten graph of `function` gives, and what became of it; parameters among the inputs do not move."""
    captured = capture(lambda *tensors: as_list(function(*tensors)), inputs)
    graph = captured.graph
    levels = {
        node: Level.STATIC if isinstance(one, nn.Parameter) else Level.MOVING
        for node, one in zip(captured.inputs, inputs, strict=True)
    }
    values = {**dict(zip(captured.inputs, inputs, strict=True)), **captured.constants}
    done = rewrite(graph, levels, policy, lambda pieces: concatenated(graph, values, pieces), **options)
    graph.lint()
    return fx.GraphModule({}, graph)(*values.values()), done


@torch.no_grad()
def check(function, *inputs, kernels, joined=0):
    """The same numbers, on these kernels and no others."""
    found, done = rewritten(function, *inputs)
    assert (done.kernels["kernels"], done.joined) == (kernels, joined)
    exact = as_list(function(*(one.double() if one.is_floating_point() else one for one in inputs)))
    for one, plain, true in zip(found, as_list(function(*inputs)), exact, strict=True):
        assert one.shape == plain.shape and one.dtype == plain.dtype
        assert_as_exact(one, plain, true)
    return done


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1]), requires_grad=False)


def row(*shape):
    return torch.randn(shape) / 2


x, y, z = (torch.randn(B, T, C) for _ in range(3))


def norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


def attention(S, *, heads=1, masked=False, gated=False, plain_norm=True):
    """A block with an absorbed adapter: norm, two projections, what mixes them, the residual."""
    bias = torch.zeros(B, 1, heads * S)
    if masked:
        bias[:, :, -1] = -math.inf
    inputs = [x, parameter(C, C), parameter(C, C), torch.randn(B, heads * S, C), torch.randn(B, heads * S, C), bias, row(B, 1, C)]

    def function(x, w_in, w_out, A, U, bias, gate):
        n = norm(x) if plain_norm else x.relu()
        output = F.linear(F.linear(n, w_in).sin(), w_out)
        mixed = ops.absorbed_attention(n, output, A, U, bias.float() if masked else None, heads)
        return x + (gate * mixed if gated else mixed)

    return function, inputs
