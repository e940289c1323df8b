"""agd_fast.memory.frozen_backward around code that writes in place, changes gradients, divides by little or runs things again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from agd_fast.memory import MODES, frozen_backward
from helpers_handlers import run
from helpers_memory import SMALLEST

ROWS, WIDTH = 16, 64
torch.manual_seed(0)
WEIGHT = torch.randn(WIDTH, WIDTH) / 8
with torch.inference_mode():
    UNTRACKED = torch.randn(ROWS, WIDTH)
    UNTRACKED_BIAS = torch.randn(WIDTH)


class Tenth(torch.autograd.Function):
    """A tenth of the gradient goes on."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 10


def normed(x):
    return F.layer_norm(x, (WIDTH,))


def turns(x):
    return torch.polar(torch.ones_like(x), x)


def cast_then_written(x, y):
    x = x * 1.5
    wide = x.double()
    x.add_(3)
    return wide * y


def projected_then_written(x, y):
    x = x * 1.5
    projected = F.linear(x, WEIGHT)
    x.add_(3)
    return projected * y


def row_then_written(x, y):
    row = torch.full((WIDTH,), 2.0)
    shifted = normed(x) + row
    row.add_(5)
    return shifted * y


def written_beside_autograd(x, y):
    known = normed(x)
    row = torch.empty_like(known.detach())
    row.data.fill_(1)
    return known * row * y


def output_written(x, y):
    projected = F.linear(x.view(2, -1, WIDTH), WEIGHT @ y.mT @ y, torch.ones(WIDTH))
    return projected.mul_(2)


def negated(x, y):
    pairs = torch.view_as_complex(normed(x).unflatten(-1, (-1, 2)))
    return pairs.conj().imag * y[:, ::2]


def hooked(x, y):
    gate = F.gelu(x)
    gate.register_hook(lambda gradient: gradient / 10)
    return gate * y


def gradient_inside(x, y):
    gate = F.silu(x).detach().requires_grad_()
    return torch.autograd.grad((gate * y).sum(), gate)[0] * x * y


CASES = {
    "a cast, whose original is written to": cast_then_written,
    "a projection, whose input is written to": projected_then_written,
    "a sum, whose row is written to": row_then_written,
    "an empty tensor, written to beside autograd": written_beside_autograd,
    "an output that is written to": output_written,
    "a view that is negated": negated,
    "a sum with what autograd may not keep": lambda x, y: (normed(x) + UNTRACKED[0]) * y,
    "a projection of what autograd may not keep": lambda x, y: F.scaled_dot_product_attention(x, F.linear(UNTRACKED, WEIGHT), y),
    "a projection with a bias that autograd may not keep": lambda x, y: F.linear(normed(x), WEIGHT, UNTRACKED_BIAS) * y,
    "a gate with a hook": hooked,
    "a gate whose gradient is made smaller": lambda x, y: Tenth.apply(F.silu(x)) * y,
    "a gate whose gradient is asked for": gradient_inside,
    "a divisor near 0": lambda x, y: x / (y.abs() ** 4 + 1e-4),
    "a divisor near 0 that is known": lambda x, y: ((known := normed(x)).detach() / F.silu(known)) * y,
    "powers": lambda x, y: torch.pow(2.0, x) * x.abs().pow(torch.linspace(1, 3, WIDTH)) * y,
    "a power that is trained": lambda x, y: x.abs().pow(2 + y.mean() - y.mean().detach()),
    "a real number by a complex one": lambda x, y: torch.view_as_real(x * turns(y)),
    "a real number divided by a complex one": lambda x, y: torch.view_as_real(x / turns(y)),
    "a real product that is added to a complex number": lambda x, y: torch.view_as_real(torch.addcmul(turns(x), x, y)),
    "a projection of complex numbers": lambda x, y: torch.view_as_real(F.linear(turns(x), turns(y))),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_plain_autograd(name, mode):
    torch.manual_seed(1)
    function, inputs = CASES[name], [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    plain, found = function(*inputs), run(mode, function, *inputs)
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), inputs)
    assert torch.equal(found, plain)
    for one, other in zip(torch.autograd.grad((found * weights).sum(), inputs), expected, strict=True):
        assert (one - other).norm() <= (1e-5 if mode == "exact" else 0.1) * other.norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_rms_norm_of_small_numbers_without_eps(dtype, mode):
    x = (torch.randn(ROWS, WIDTH) / 20).to(dtype).requires_grad_()
    weights = torch.randn(ROWS, WIDTH, dtype=dtype)
    expected, found = (
        torch.autograd.grad(output, x, weights)[0]
        for output in (F.rms_norm(x, (WIDTH,)), run(mode, lambda x: F.rms_norm(x, (WIDTH,)), x))
    )
    assert (found - expected).norm() <= 0.1 * expected.norm()


def test_a_linear_of_one_output_under_autocast():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = F.linear(x, WEIGHT[0]), run("8bit", lambda x: F.linear(x, WEIGHT[0]), x)
    expected, found = (torch.autograd.grad(output.sum(), x)[0] for output in outputs)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("mode", MODES)
def test_a_function_that_was_compiled_stays_compiled(mode):
    eager = lambda x, y: F.silu(x) * y + F.gelu(x)  # noqa: E731
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    inputs = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    found, expected = (
        torch.autograd.grad(output.square().sum(), inputs) for output in (run(mode, compiled, *inputs), eager(*inputs))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """again: whether it runs itself again in backward, by torch's own function."""

    def __init__(self, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(512), nn.Linear(512, 64), nn.Linear(64, 512)
        self.again = again
        self.requires_grad_(False)

    def body(self, x):
        return x + self.down(F.silu(self.up(self.norm(x))))

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.again else self.body(x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("again", ["inside", "outside"])
def test_what_torch_runs_again_is_left_to_it(again, mode):
    x, model = torch.randn(4, 512, requires_grad=True), Block(again == "inside")
    (expected,) = torch.autograd.grad(Block()(x).square().sum(), x)
    with frozen_backward(model, SMALLEST[mode]):
        for _ in range(2):  # the second knows which norms are read by none but themselves
            output = checkpoint(model, x, use_reentrant=False) if again == "outside" else model(x)
            assert torch.equal(torch.autograd.grad(output.square().sum(), x)[0], expected)


class Buffered(nn.Module):
    """A row is added, and is written to when what was made of it has been kept."""

    gradient_checkpointing = True

    @staticmethod
    def _gradient_checkpointing_func(function, *args):
        return checkpoint(function, *args, use_reentrant=False)

    def block(self, x, y):
        row = torch.ones(WIDTH)
        product = (normed(x) + row) * y
        row.add_(5)
        return F.silu(product)

    def forward(self, x, y):
        return self._gradient_checkpointing_func(self.block, x, y)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_written_to_when_it_has_been_kept_is_refused_in_blocks_too(mode):
    model, inputs = Buffered(), [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    with frozen_backward(model, SMALLEST[mode]), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(*inputs).sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run(mode, model.block, *inputs).sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_differentiated_is_refused(mode):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    output = run(mode, lambda x: F.silu(x.exp()), x)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.square().sum().backward()


def test_transforms_of_torch_are_left_to_it():
    x, tangent = torch.randn(4, 512), torch.randn(4, 512)
    found = []
    for model in (Block(), Block()):
        with frozen_backward(model, SMALLEST["8bit" if found else "exact"]):
            gradient = torch.func.grad(lambda x, model=model: model(x).square().sum())(x)
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
                found.append((gradient, forward_ad.unpack_dual(model(dual)).tangent))
    assert all(map(torch.equal, *found))
