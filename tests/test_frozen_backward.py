"""agd_fast.memory.frozen_backward: the same forwards, bit for bit, whose backward needs less to be kept."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import agd_fast as agd
from agd_fast.attaching import require_attachment
from agd_fast.families import find_spec
from agd_fast.forward import nest
from agd_fast.memory import MODES, Mode, frozen_backward, interception
from agd_fast.memory.blocks import _Again, checkpointing
from agd_fast.memory.counting import FusedAttention
from agd_fast.memory.interception import FrozenBackward
from agd_fast.memory.ops import NAMESPACE
from conftest import assert_as_exact, double, make_backbone, trained
from helpers_families import _Wide
from helpers_memory import SMALLEST, Problem, digits_problem, keeping, nodes, problem_of, tensors_in
from tiny import FAMILIES

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from speed.architectures import build, find_architecture


@pytest.fixture(scope="module", params=FAMILIES)
def problem(request):
    return problem_of(FAMILIES[request.param])


@pytest.mark.parametrize("mode", MODES)
def test_forwards_are_the_same_bit_for_bit(problem, mode):
    assert torch.equal(problem.gradient(mode)[0], problem.output())


def test_exact_gradients_are_autograds_to_rounding(problem):
    (_, plain), (_, found) = problem.gradient(), problem.gradient("exact")
    assert plain.any()
    reference = Problem(double(problem.denoiser), _doubled(problem.arguments), problem.omega)
    with _Wide():
        exact = reference.gradient()[1]
    assert_as_exact(found, plain, exact)


@pytest.mark.parametrize("mode", MODES)
def test_less_is_kept_and_counters_see_all_of_it(problem, mode):
    with keeping(problem.denoiser, problem.adapter) as plain:
        output = problem.output()
        eager = plain.total
    del output
    with frozen_backward(problem.denoiser, SMALLEST[mode]):
        for _ in range(2):
            with keeping(problem.denoiser, problem.adapter) as kept:
                output = problem.output()
                assert kept.total < eager
    for node in nodes(output):
        assert not tensors_in(getattr(node, "__dict__", {})), node


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _doubled(inner) for name, inner in value.items()}
    return type(value)(map(_doubled, value)) if isinstance(value, (list, tuple)) else value


@pytest.fixture(params=["dit", "unet"])
def armed_backbone(request) -> Problem:
    torch.manual_seed(0)
    backbone = make_backbone(request.param)
    agd.attach(backbone.denoiser.requires_grad_(False), agd.AdapterConfig(kind="cross_attention", hidden=4))
    trained(require_attachment(backbone.denoiser).adapter)
    return Problem(backbone.denoiser, backbone.inputs())


def state_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(vars(child)) for name, child in module.named_modules()}


def test_leaving_restores_everything(armed_backbone):
    denoiser = armed_backbone.denoiser
    before = state_of(denoiser)
    with pytest.raises(KeyError), frozen_backward(denoiser, "4bit"):
        armed_backbone.output()
        assert "forward" in vars(denoiser)
        raise KeyError
    assert state_of(denoiser) == before


def test_a_forward_of_the_instances_own_is_wrapped_and_comes_back(armed_backbone):
    denoiser, seen = armed_backbone.denoiser, []
    own = denoiser.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.overrides._get_current_function_mode())
        return own(*args, **kwargs)

    denoiser.forward = forward
    with frozen_backward(denoiser, "8bit"):
        armed_backbone.output()
    assert isinstance(seen[0], FrozenBackward) and denoiser.forward is forward


def test_forwards_without_gradients_are_not_touched(armed_backbone, monkeypatch):
    monkeypatch.setattr(FrozenBackward, "__enter__", None)
    expected = armed_backbone.output()
    with torch.no_grad(), frozen_backward(armed_backbone.denoiser, "4bit"):
        assert torch.equal(armed_backbone.output(), expected)


def test_weights_that_are_not_frozen_are_named(armed_backbone):
    armed_backbone.denoiser.get_submodule(
        "conv_in" if hasattr(armed_backbone.denoiser, "conv_in") else "proj_out_1"
    ).requires_grad_()
    message = r"frozen.*'(conv_in|proj_out_1)\.weight'.*requires grad"
    with pytest.raises(ValueError, match=message), frozen_backward(armed_backbone.denoiser):
        pass


def test_an_unknown_mode_is_refused_with_those_there_are(armed_backbone):
    message = "'exact', '8bit', '4bit', 'recompute'; found '2bit'"
    with pytest.raises(ValueError, match=message), frozen_backward(armed_backbone.denoiser, "2bit"):
        pass


@pytest.mark.parametrize("wrong", [{"fine": 8}, {"norm": 8}, {"norm": 8, "fine": 3, "factor": 8}, {"groups": (16, 64)}])
def test_a_mode_of_bits_that_do_not_go_together_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Mode(**wrong)


def test_it_is_not_entered_twice(armed_backbone):
    outer, inner = nn.Sequential(armed_backbone.denoiser), armed_backbone.denoiser
    for first, second in ((inner, outer), (inner, inner), (outer, inner)):
        with frozen_backward(first, "8bit"), pytest.raises(ValueError, match="already"), frozen_backward(second, "8bit"):
            pass


def test_backward_may_run_after_it_was_left(armed_backbone):
    with frozen_backward(armed_backbone.denoiser, SMALLEST["8bit"]):
        output = armed_backbone.output()
    output.sum().backward()
    assert any(parameter.grad is not None for parameter in armed_backbone.adapter.parameters())


def test_weights_changed_before_backward_are_refused(armed_backbone):
    with frozen_backward(armed_backbone.denoiser, SMALLEST["4bit"]):
        output = armed_backbone.output()
    with torch.no_grad():
        for parameter in armed_backbone.denoiser.parameters():
            parameter.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("mode", SMALLEST)
def test_checkpointed_blocks_run_again_as_they_ran(armed_backbone, mode):
    """Their re-runs keep what their forwards kept, which torch checks: the same norms in the fine form."""
    chosen = replace(SMALLEST[mode], narrow=0)
    once, much = armed_backbone.gradient(chosen), kept_by(armed_backbone, "exact")
    armed_backbone.denoiser.enable_gradient_checkpointing()
    found, little = armed_backbone.gradient(chosen), kept_by(armed_backbone, mode)
    assert little < much
    assert torch.equal(found[0], once[0])
    assert (found[1] - once[1]).norm() <= (1e-5 if mode == "exact" else 0.2) * once[1].norm()


@pytest.mark.parametrize("mode", [name for name in MODES if name != "exact"])
def test_what_runs_again_is_packed_then_alone_and_to_the_same_bits(armed_backbone, mode, monkeypatch):
    with checkpointing(armed_backbone.denoiser):
        found, little = armed_backbone.gradient(SMALLEST[mode]), packed_by(armed_backbone, mode)
        monkeypatch.setattr(interception, "_is_checkpointed", lambda: False)
        expected, much = armed_backbone.gradient(SMALLEST[mode]), packed_by(armed_backbone, mode)
    assert all(map(torch.equal, found, expected)) and found[1].any()
    assert little < much


def packed_by(problem: Problem, mode: str) -> int:
    """Calls of packing ops in a forward."""
    with frozen_backward(problem.denoiser, SMALLEST[mode]), Packing() as packing:
        problem.output()
    return packing.calls


class Packing(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == NAMESPACE
        return func(*args, **(kwargs or {}))


class Checkpointing(nn.Module):
    """A norm, and beyond the border of a block that is run again a linear with a weight that is no part of the module."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.gradient_checkpointing, self.weights = True, [weight]
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._gradient_checkpointing_func(lambda h: F.linear(h, self.weights[0]), F.layer_norm(x, (8,)))


@pytest.mark.parametrize("mode", MODES)
def test_nothing_that_was_known_outside_of_a_block_is_used_inside(mode):
    model = Checkpointing(torch.randn(3, 8, requires_grad=True))
    with frozen_backward(model, SMALLEST[mode]):
        model(torch.randn(4, 8, requires_grad=True)).sum().backward()
    assert model.weights[0].grad is not None


def kept_by(problem: Problem, mode: str) -> int:
    with frozen_backward(problem.denoiser, SMALLEST[mode]), keeping(problem.denoiser, problem.adapter) as kept:
        output = problem.output()
        return kept.total if output.requires_grad else 0


def never(graph: Any, inputs: Any) -> Callable[..., Any]:
    raise AssertionError("nothing is to be compiled")


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("how", ["wrapped", "in place", "by blocks"])
def test_compiled_models_run_eagerly(armed_backbone, how, fullgraph):
    expected = armed_backbone.gradient("8bit")
    denoiser = armed_backbone.denoiser
    options = {"backend": never, "fullgraph": fullgraph}
    model: Any = denoiser
    if how == "wrapped":
        model = torch.compile(denoiser, **options)
    elif how == "in place":
        denoiser.compile(**options)
    else:
        for block in getattr(denoiser, "transformer_blocks", None) or denoiser.down_blocks:
            block.compile(**options)
    with frozen_backward(model, SMALLEST["8bit"]):
        found = Problem(model, armed_backbone.arguments).gradient()
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast(armed_backbone, mode):
    """Gradients lose no more than twice what autocast itself does."""
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = armed_backbone.gradient(), armed_backbone.gradient(mode)
    assert torch.equal(plain[0], found[0])
    if mode == "exact":
        reference = Problem(double(armed_backbone.denoiser), _doubled(armed_backbone.arguments), armed_backbone.omega)
        exact = reference.gradient()[1]
        assert (found[1] - exact).norm() <= 2 * (plain[1] - exact).norm()


def test_under_autocast_casts_of_frozen_weights_are_not_kept(armed_backbone):
    denoiser = armed_backbone.denoiser
    shapes = {tuple(parameter.shape) for parameter in denoiser.parameters() if parameter.ndim > 1}
    counts = []
    for mode in (None, "exact"):
        context = frozen_backward(denoiser, SMALLEST[mode]) if mode else nullcontext()
        with torch.autocast("cpu", torch.bfloat16), context, keeping(denoiser, armed_backbone.adapter) as kept:
            output = armed_backbone.output()
            weights = [one.tensor for one in kept.alive() if one.tensor.dtype == torch.bfloat16]
            counts.append(sum(tuple(one.shape) in shapes for one in weights))
        del output
    assert counts[0] > 0 == counts[1]


def test_a_plan_of_another_forward_costs_no_correctness(armed_backbone):
    """Forwards may take turns: with the adapter at work or not, as a plan of the one meets the other."""
    first = armed_backbone.gradient("4bit", forwards=1)[1]
    with frozen_backward(armed_backbone.denoiser, SMALLEST["4bit"]):
        sample = find_spec(armed_backbone.denoiser).sample
        x = armed_backbone.arguments[sample].clone().requires_grad_()
        armed_backbone.denoiser(**{**armed_backbone.arguments, sample: x})[
            0
        ].sum().backward()  # no adapter: nothing is asked for in the fine form
        parameters = [*armed_backbone.adapter.parameters()]
        found = torch.autograd.grad(armed_backbone.output().square().mean(), parameters)
    assert torch.cosine_similarity(torch.cat([one.flatten() for one in found]), first, dim=0) > 0.99


def test_copies_of_the_model_are_free_of_it(armed_backbone):
    with frozen_backward(armed_backbone.denoiser, "8bit"):
        pass
    assert "forward" not in vars(copy.deepcopy(armed_backbone.denoiser))


BARS = {"exact": 1 - 1e-6, "8bit": 0.9999, "4bit": 0.9995, "recompute": 0.9999}  # cosines with the exact gradient


@pytest.mark.parametrize("outliers", [1.0, 100.0])
@pytest.mark.parametrize("kind", [None, "cross_attention"])
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_gradients_of_trained_models_keep_their_direction(name, kind, outliers):
    problem = digits_problem(name, kind, outliers)
    exact = problem.gradient()[1]
    found = {mode: torch.cosine_similarity(problem.gradient(mode)[1], exact, dim=0) for mode in MODES}
    assert all(found[mode] >= least for mode, least in BARS.items()), found


GIB = 2**30
MOST = {  # GiB kept at batch 1 in bfloat16, with cross-attention adapters
    ("sdxl-1024", "4bit"): 1.25,
    ("sdxl-1024", "recompute"): 0.60,
    ("sd21-768", "4bit"): 0.37,
    ("sd3-medium-1024", "4bit"): 1.15,
}


@pytest.mark.parametrize(("name", "mode"), MOST)
def test_what_public_models_keep(name, mode):
    architecture, meta = find_architecture(name), torch.device("meta")
    denoiser = build(architecture, meta, torch.bfloat16).requires_grad_(False)
    spec = find_spec(denoiser)
    adapter = agd.attach(denoiser, agd.AdapterConfig(kind="cross_attention"))
    x = torch.empty(1, *architecture.sample, device=meta, dtype=torch.bfloat16)
    inputs = {spec.sample: x, spec.timestep: torch.empty(1, device=meta), **nest(architecture.inputs(1, meta, torch.bfloat16, 1))}
    with frozen_backward(denoiser, mode), agd.guided(denoiser, 5.0), FusedAttention():
        denoiser(**inputs, **architecture.constants(1), return_dict=False)
        with keeping(denoiser, adapter) as kept:
            output = denoiser(**inputs, **architecture.constants(1), return_dict=False)[0]
            assert kept.total / GIB <= MOST[name, mode], kept.by_op()
    assert output.requires_grad


class Rerun(nn.Module):
    """Blocks that run again in backward; what is saved inside of them goes to other hooks first where `inner` is set."""

    def __init__(self, function, inner):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.gradient_checkpointing, self._gradient_checkpointing_func, self.inner = True, function, inner

    def block(self, x):
        with torch.autograd.graph.save_on_cpu() if self.inner else nullcontext():
            return x + self.second(F.silu(self.first(self.norm(x))))

    def forward(self, x):
        return self._gradient_checkpointing_func(self.block, self._gradient_checkpointing_func(self.block, x))


def saving_products(context, op, *args, **kwargs):
    kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE = partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, saving_products))


@pytest.mark.parametrize(("function", "inner"), [(_Again(draws=False), False), (_Again(draws=False), True), (SELECTIVE, False)])
def test_what_is_read_again_is_written(function, inner):
    gradients = []
    for one, within in ((lambda block, x: block(x), False), (function, inner)):
        torch.manual_seed(0)
        model = Rerun(one, within).requires_grad_(False)
        x = torch.randn(64, 32, 64, requires_grad=True)
        with frozen_backward(model, activations="8bit"):
            model(x).square().mean().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients) and gradients[0].any()
