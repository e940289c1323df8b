"""torch.compile(model, backend="agd_fast"): found by name, as exact as eager, one graph for all steps, nothing stale."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch._dynamo.backends.registry import _COMPILER_FNS, register_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import agd_fast as agd
from agd_fast.backend import graphs_info
from agd_fast.families import find_spec
from agd_fast.forward import forward_parameters
from conftest import Backbone, assert_as_exact, double, make_backbone, trained
from tiny import FAMILIES

EAGER = {"kernels": "always", "compiler": "eager"}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def frozen(denoiser, kind=None, spec=None):
    denoiser.eval().requires_grad_(False)
    trained(agd.attach(denoiser, agd.AdapterConfig(kind, 4), spec=spec))
    return denoiser


def digits():
    teacher = agd.datasets.digits_teacher()
    inputs = {"hidden_states": torch.randn(2, *teacher.sample_shape), "class_labels": torch.tensor([1, 2])}
    return frozen(teacher.denoiser), inputs


def from_pipeline(name, component):
    """A denoiser of tests/tiny, with the arguments that its pipeline gave it."""
    family = FAMILIES[name]
    pipe, calls = family.pipeline(), []
    denoiser = getattr(pipe, component)
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    pipe(**family.inputs(1), **family.call, **family.guided)
    hook.remove()
    args, kwargs = calls[0]
    inputs = {**dict(zip(forward_parameters(denoiser), args, strict=False)), **kwargs}
    return frozen(denoiser), {name: value for name, value in inputs.items() if name not in ("timestep", "return_dict")}


def doubled(inputs):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


CASES = {
    "digits": (digits, "inductor"),
    "unet": (lambda: from_pipeline("sd15", "unet"), "aot_eager"),
    "sd3": (lambda: from_pipeline("sd3", "transformer"), "aot_eager"),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_schedule_at_three_scales_is_one_compilation_and_as_exact_as_eager(name):
    make, compiler = CASES[name]
    denoiser, inputs = make()
    exact = double(denoiser)
    compiled = torch.compile(denoiser, backend="agd_fast", fullgraph=True, options={"kernels": "always", "compiler": compiler})
    sample = find_spec(denoiser).sample
    graphs = None
    for scale in (2.0, 3.5, 5.0):
        for step, t in enumerate(torch.linspace(900, 0, 10).long()):
            given = {
                **inputs,
                sample: inputs[sample] * (1 + step),
                "timestep": t.expand(len(inputs[sample])),
                "return_dict": False,
            }
            with agd.guided(denoiser, scale):
                found, plain = compiled(**given)[0], denoiser(**given)[0]
            if t == 0:  # sinusoids of large t lose more than this is about
                with agd.guided(exact, scale):
                    assert_as_exact(found, plain, exact(**doubled(given))[0])
            graphs = graphs or counters["stats"]["unique_graphs"]
            assert counters["stats"]["unique_graphs"] == graphs <= 2  # torch leaves hooks outside: the conditioning is one more
    assert not counters["graph_break"]
    assert graphs_info()[-1]["kernels"] and not graphs_info()[-1]["untouched_because"]


@torch.no_grad()
def test_hooks_and_forward_are_one_graph_where_torch_is_told_so():
    denoiser, inputs = digits()
    with torch._dynamo.config.patch(wrap_top_frame=True):
        compiled = torch.compile(denoiser, backend="agd_fast", fullgraph=True, options=EAGER)
        for scale in (2.0, 3.5, 5.0):
            for t in (900, 500, 0):
                with agd.guided(denoiser, scale):
                    compiled(**inputs, timestep=torch.tensor([t, t]))
    assert counters["stats"]["unique_graphs"] == 1


def test_found_by_name_after_an_import_of_torch_alone():
    script = (
        "import sys, torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU()).requires_grad_(False)\n"
        "compiled = torch.compile(model, backend='agd_fast', options={'kernels': 'always', 'compiler': 'eager'})\n"
        "x = torch.randn(2, 3, 4)\n"
        "torch.testing.assert_close(compiled(x), model(x))\n"
        "from agd_fast.backend import graphs_info\n"
        "print(graphs_info()[-1]['kernels'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "{'activated_linear': 1}" in done.stdout


@pytest.fixture
def recorder():
    """The graphs that reach the compiler underneath."""
    seen = []
    register_backend(lambda gm, inputs: seen.append(gm) or gm.forward, name="recorder")
    yield seen
    del _COMPILER_FNS["recorder"]


@torch.no_grad()
def test_a_graph_without_a_known_pattern_is_untouched(recorder):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    compiled = torch.compile(model, backend="agd_fast", options={"kernels": "always", "compiler": "recorder"})
    x = torch.randn(2, 3, 4)
    assert torch.equal(compiled(x), model(x))
    assert any("relu" in str(node.target) for node in recorder[0].graph.nodes)  # as Dynamo made it, not as operators of aten
    assert not any("aten" in str(node.target) for node in recorder[0].graph.nodes)
    assert "no kernel of ours" in graphs_info()[-1]["untouched_because"]


@torch.no_grad()
@pytest.mark.parametrize("kernels", ["auto", "never"])
def test_on_a_cpu_graphs_are_untouched_unless_told_otherwise(recorder, kernels):
    backbone = make_backbone("dit")
    frozen(backbone.denoiser)
    compiled = torch.compile(backbone.denoiser, backend="agd_fast", options={"kernels": kernels, "compiler": "recorder"})
    with agd.guided(backbone.denoiser, 3.0):
        found, plain = compiled(**backbone.inputs()).sample, backbone(**backbone.inputs())
    assert torch.equal(found, plain)
    assert not any("agd_fast_kernels" in str(node.target) for gm in recorder for node in gm.graph.nodes)
    reasons = {"auto": "tensors on cpu", "never": "switched off"}
    assert reasons[kernels] in graphs_info()[-1]["untouched_because"]


def test_a_graph_for_training_passes_through_with_the_eager_gradients():
    backbone = make_backbone("tiny")
    backbone.denoiser.requires_grad_(False)
    adapter = trained(agd.attach(backbone.denoiser, agd.AdapterConfig("modulation", 4), spec=backbone.spec))

    def gradients(denoiser):
        adapter.zero_grad()
        with agd.guided(backbone.denoiser, 3.0):
            denoiser(**backbone.inputs()).square().sum().backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    compiled = torch.compile(
        backbone.denoiser, backend="agd_fast", fullgraph=True, options={"kernels": "always", "compiler": "eager"}
    )
    for found, expected in zip(gradients(compiled), gradients(backbone.denoiser), strict=True):
        assert torch.equal(found, expected)
    assert graphs_info()[-1]["untouched_because"] == "it is for training"


@torch.no_grad()
def test_blocks_compiled_one_by_one_share_a_graph_and_have_weights_of_their_own():
    backbone = make_backbone("unet")
    frozen(backbone.denoiser, "cross_attention")
    inputs = backbone.inputs()
    with agd.guided(backbone.denoiser, 3.0):
        plain = backbone(**inputs)
    exact = double(backbone.denoiser)
    backbone.denoiser.compile_repeated_blocks(backend="agd_fast", fullgraph=True, options=EAGER)
    with agd.guided(backbone.denoiser, 3.0), agd.guided(exact, 3.0):
        found = backbone(**inputs)
        twin = Backbone(exact, backbone.spec)
        assert_as_exact(found, plain, twin(**doubled(inputs)))
    assert any(one["kernels"] for one in graphs_info())


class Projections(nn.Module):
    """Of the same tokens: one that ends with a gelu, a wide one, and a thin one that is cast where it is used."""

    def __init__(self):
        super().__init__()
        self.up, self.wide, self.thin = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8, bias=False).double()
        self.requires_grad_(False)

    def forward(self, x):
        return nn.functional.gelu(self.up(x)), self.wide(x) * 2, nn.functional.linear(x, self.thin.weight.to(x.dtype)) * 3


CHANGES = {
    "in place": lambda model: model.wide.weight.mul_(2),
    "in place through data": lambda model: model.wide.weight.data.mul_(2),
    "cast, in place through data": lambda model: model.thin.weight.data.mul_(2),
    "other data": lambda model: setattr(model.wide.weight, "data", torch.randn(16, 8)),
    "other weight": lambda model: setattr(model.wide, "weight", nn.Parameter(torch.randn(16, 8), requires_grad=False)),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_are_followed(change):
    model, x = Projections(), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="agd_fast", options=EAGER)
    first = compiled(x)
    assert graphs_info()[-1]["kernels"] == {"activated_linear": 1}
    CHANGES[change](model)
    again = compiled(x)
    for one, plain, exact in zip(again, model(x), double(model)(x.double()), strict=True):
        assert_as_exact(one, plain, exact)
    assert not all(map(torch.equal, first, again))


@torch.no_grad()
def test_lora_that_is_fused_into_weights_is_followed():
    """PEFT writes through `tensor.data`, of which torch keeps no count."""
    config = LoraConfig(r=2, target_modules=["wide"], init_lora_weights=False)
    model, x = inject_adapter_in_model(config, Projections()).requires_grad_(False), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="agd_fast", options=EAGER)
    found = []
    for _ in range(2):
        model.wide.merge()
        found.append(model(x)[1])
        torch.testing.assert_close(compiled(x)[1], found[-1])
        model.wide.unmerge()
        model.wide.scale_layer(6.0)
    assert not torch.allclose(*found, rtol=0.01) and graphs_info()[-1]["kernels"]


@torch.no_grad()
def test_a_rewrite_that_fails_costs_no_model(monkeypatch):
    def fails(*_, **__):
        raise KeyError("nothing there")

    monkeypatch.setattr("agd_fast.backend.compile.rewrite", fails)
    model, x = Projections(), torch.randn(2, 5, 8)
    with pytest.warns(UserWarning, match="goes to eager as it is: it could not be rewritten \\(KeyError"):
        found = torch.compile(model, backend="agd_fast", options=EAGER)(x)
    assert all(map(torch.equal, found, model(x)))
    assert "KeyError" in graphs_info()[-1]["untouched_because"]


@torch.no_grad()
def test_graphs_for_more_than_one_shape_and_under_autocast_are_untouched():
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU()).requires_grad_(False)
    compiled = torch.compile(model, backend="agd_fast", dynamic=True, options=EAGER)
    for tokens in (3, 5, 9):
        x = torch.randn(2, tokens, 4)
        assert torch.equal(compiled(x), model(x))
    assert "more than one shape" in graphs_info()[-1]["untouched_because"]
    compiled = torch.compile(model, backend="agd_fast", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(torch.ones(2, 3, 4)), model(torch.ones(2, 3, 4)))
    assert "autocast" in graphs_info()[-1]["untouched_because"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"kernels": "sometimes"}}, "options\\['kernels'\\] must be one of 'auto', 'always', 'never'"),
        ({"mode": "reduce-overhead"}, "records CUDA graphs of its own"),
        ({"mode": "fastest"}, "mode must be one of"),
    ],
)
def test_wrong_options_say_what_there_is(arguments, message):
    compiled = torch.compile(nn.Linear(2, 2), backend="agd_fast", **arguments)
    with pytest.raises((BackendCompilerFailed, ValueError), match=message):
        compiled(torch.randn(1, 2))
