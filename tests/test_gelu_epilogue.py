"""Products that end with their gelu, as libraries can."""

from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import agd_fast as agd
from agd_fast import ops
from agd_fast.attaching import scoped
from agd_fast.backend import graphs_info
from agd_fast.graph.capture import schema_name
from agd_fast.ops.choice import EPILOGUE
from agd_fast.ops.measuring import measure_library
from conftest import assert_as_exact
from helpers_engine import RECORDED, assert_same, own_forwards
from helpers_fusing import C, as_list, parameter, rewritten, x, y
from tiny import dit

N = 12
UP = parameter(N, C), parameter(N)


def end(function, *inputs, policy="always"):
    """How many products end with their gelu, and what the graph gives."""
    found, done = rewritten(function, *inputs, policy="never", gelu_epilogue=policy)
    return done.gelu_epilogues, found


@pytest.mark.parametrize("device", EPILOGUE)
def test_the_gelu_of_each_device_is_torchs(device):
    by_parts = decomposition_table[torch.ops.aten._addmm_activation.default]
    with FakeTensorMode():
        given = [torch.empty(shape, device=device) for shape in ((4,), (3, 8), (8, 4))]
        graph = make_fx(lambda *given: by_parts(*given, use_gelu=True))(*given).graph
    gelus = [node for node in graph.nodes if schema_name(node) == "aten::gelu"]
    assert [node.kwargs.get("approximate", "none") for node in gelus] == [EPILOGUE[device]]


@torch.no_grad()
@pytest.mark.parametrize("given", [x, x[0], x.mT.contiguous().mT, torch.randn(3, 7, 2 * C)[..., C:]])
def test_numbers_are_the_same(given):
    def function(h, weight, bias):
        return F.gelu(F.linear(h, weight, bias)) * 2

    count, found = end(function, given, *UP)
    exact = as_list(function(given.double(), *(one.double() for one in UP)))
    assert count == 1
    for one, plain, true in zip(found, as_list(function(given, *UP)), exact, strict=True):
        assert one.shape == plain.shape and one.stride() == plain.stride()
        assert_as_exact(one, plain, true)


@pytest.mark.parametrize(
    "function",
    [
        lambda h, weight, bias: F.gelu(F.linear(h, weight)),
        lambda h, weight, bias: F.gelu(F.linear(h, weight, bias), approximate="tanh"),  # not on a CPU
        lambda h, weight, bias: F.silu(F.linear(h, weight, bias)),
        lambda h, weight, bias: [(z := F.linear(h, weight, bias)), F.gelu(z)],
        lambda h, weight, bias: F.gelu(F.linear(h, weight, bias) + 1),
    ],
    ids=["no bias", "another gelu", "no gelu", "taken by others", "not of the product"],
)
def test_others_stay_as_they_are(function):
    assert end(function, x, *UP)[0] == 0


@torch.no_grad()
def test_what_is_written_in_between_is_read_before():
    def function(x, y, weight, bias):
        h = x + 0.5
        z = F.linear(h, weight, bias)
        h.mul_(2)
        return F.gelu(z) + h.sum(), F.gelu(F.linear(y, weight, bias))

    count, found = end(function, x, y, *UP)
    assert count == 1
    for one, plain in zip(found, function(x, y, *UP), strict=True):
        torch.testing.assert_close(one, plain)


def test_who_decides():
    weight, bias = UP
    found = [ops.refusal_of_epilogue(x[0], weight, bias, "none", policy) for policy in ("always", "never", "auto")]
    assert found == ["", "it is switched off", "tensors on cpu"]
    reason = "products on cpu do not end with a gelu of approximate='tanh'"
    assert ops.refusal_of_epilogue(x[0], weight, bias, "tanh", "always") == reason
    assert end(lambda h, *own: F.gelu(F.linear(h, *own)), x, *UP, policy="auto")[0] == 0


@pytest.fixture(scope="module")
def denoisers():
    """Two with the same weights, whose feed-forwards have the gelu of a CPU's products."""
    found = []
    for _ in range(2):
        pipe = dit.pipeline()
        found.append(DiTTransformer2DModel.from_config(pipe.transformer.config, activation_fn="gelu", num_layers=1).eval())
        found[-1].load_state_dict(pipe.transformer.state_dict(), strict=False)  # of one block
    return found


@torch.no_grad()
@pytest.mark.parametrize("options", [{"kernels": "never", "compile": True}, {"kernels": "always"}], ids=["compiled", "kernels"])
def test_an_engine_gives_the_same(denoisers, options):
    plain, fast = denoisers
    side = plain.config.sample_size
    given = torch.randn(2, plain.config.in_channels, side, side), torch.tensor([3, 3]), torch.tensor([1, 2])
    agd.optimize(fast, agd.EngineConfig(**options, gelu_epilogue=True))
    expected = plain(*given).sample
    with scoped(fast, torch.tensor([3])), own_forwards(fast) as seen:
        for _ in range(3):
            assert_same(fast(*given).sample, expected)
    found = agd.info(fast)["engine"]
    ended, on_kernels = found["gelu_epilogues"], found["kernels"].get("activated_linear", 0)  # which come first
    assert (ended, on_kernels) == ((0, 1) if options["kernels"] == "always" else (1, 0)) and len(seen) == RECORDED


def test_a_kernel_has_to_beat_it():
    """On CUDA it is raced against; elsewhere nothing of a library ends so."""
    assert ops.activated_linear.library is not None
    with pytest.raises(ValueError, match="no product of a library"):
        ops.activated_linear.library(x, *UP, "gelu_tanh")


@pytest.mark.parametrize(("milliseconds", "wins"), [((3.0, 2.0, 1.0), True), ((3.0, 1.0, 2.0), False), ((1.0, 3.0, 2.0), False)])
def test_it_has_to_beat_both_ways_of_torch(milliseconds, wins, monkeypatch):
    """The race of a card, with times that are given. Here the library's gelu is by definition."""
    times = iter(milliseconds)  # eager, compiled, library
    monkeypatch.setattr("triton.testing.do_bench", lambda run, **_: (run(), next(times))[1])
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    op = replace(
        ops.activated_linear, library=lambda h, weight, bias, _: torch._addmm_activation(bias, h, weight.t(), use_gelu=True)
    )
    found = measure_library(op, (x[0], *UP, "gelu"))
    assert (
        found["wins"] == wins and dict(zip(("eager", "compiled", "library"), milliseconds, strict=True)) == found["milliseconds"]
    )


@pytest.mark.parametrize("takes", [True, False])
def test_in_a_backend(takes, monkeypatch):
    reason = "" if takes else "it is slower"
    monkeypatch.setattr(ops, "refusal_of_epilogue", lambda *_: reason)
    torch._dynamo.reset()
    module = torch.nn.Sequential(torch.nn.Linear(C, N), torch.nn.GELU())
    compiled = torch.compile(module, backend="agd_fast", options={"kernels": "auto", "compiler": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x))
    assert graphs_info()[-1]["gelu_epilogues"] == takes and bool(graphs_info()[-1]["untouched_because"]) != takes
