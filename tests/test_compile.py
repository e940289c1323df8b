"""torch.compile before and after attaching, of the whole denoiser and block by block."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import agd_fast as agd
from conftest import TinyDenoiser, assert_as_exact, double, make_backbone, make_unet, trained

KINDS = ["modulation", "offset", "cross_attention", "modulation+gated_lora"]


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def attach(backbone, kind="modulation"):
    return trained(agd.attach(backbone.denoiser, agd.AdapterConfig(kind, 4), spec=backbone.spec))


@torch.no_grad()
def run(backbone, inputs, scale=None, denoiser=None):
    backbone = type(backbone)(backbone.denoiser if denoiser is None else denoiser, backbone.spec)
    if scale is None:
        return backbone(**inputs)
    with agd.guided(backbone.denoiser, scale):
        return backbone(**inputs)


def call(compiled, inputs):
    output = compiled(**inputs)
    return output if isinstance(output, torch.Tensor) else output.sample


@pytest.mark.parametrize(("name", "kind"), [*((name, kind) for name in ("dit", "tiny") for kind in KINDS), ("unet", KINDS[0])])
def test_compiled_denoiser_is_guided_in_one_graph_and_never_recompiles(name, kind):
    backbone = make_backbone(name)
    attach(backbone, kind)
    counter = CompileCounter()
    compiled = torch.compile(backbone.denoiser, backend=counter, fullgraph=True)
    for seed, scale in enumerate((2.0, 3.5, 5.0)):
        inputs = backbone.inputs(seed=seed)
        assert torch.equal(run(backbone, inputs, scale, compiled), run(backbone, inputs, scale))
        assert counter.frame_count == 2  # torch.compile(module) leaves its hooks outside: the conditioning is a graph of its own
    inputs = backbone.inputs()
    assert torch.equal(run(backbone, inputs, None, compiled), run(backbone, inputs))
    for scale in (2.0, 3.0):
        run(backbone, inputs, scale, compiled)
        run(backbone, inputs, None, compiled)
    assert counter.frame_count == 3  # one more that is not armed


def test_compiled_denoiser_does_not_recompile_for_scales_per_sample(dit):
    attach(dit)
    counter = CompileCounter()
    eager = copy.deepcopy(dit)
    dit.denoiser.compile(backend=counter, fullgraph=True)
    for seed, scales in enumerate(([1.0, 2.0, 3.0], [4.0, 4.0, 5.0], [6.0, 1.0, 1.5])):
        inputs = dit.inputs(seed=seed)
        assert torch.equal(run(dit, inputs, scales), run(eager, inputs, scales))
        assert counter.frame_count == 2


@pytest.mark.parametrize(("name", "in_place"), [("dit", True), ("unet", False), ("tiny", False), ("tiny", True)])
def test_attach_and_unload_after_a_first_compiled_call_are_seen(name, in_place):
    backbone = make_backbone(name)
    inputs = backbone.inputs()
    base = run(backbone, inputs)
    if in_place:
        compiled = backbone.denoiser
        compiled.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(backbone.denoiser, backend="eager", fullgraph=True)
    assert torch.equal(run(backbone, inputs, None, compiled), base)
    for kind in ("modulation", "cross_attention"):
        attach(backbone, kind)
        found = run(backbone, inputs, 3.0, compiled)
        assert not torch.equal(found, base)
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(found, run(backbone, inputs, 3.0))
        assert torch.equal(run(backbone, inputs, None, compiled), base)
        agd.unload(compiled)
        assert torch.equal(run(backbone, inputs, None, compiled), base)


def blocks_of(backbone):
    if isinstance(backbone.denoiser, TinyDenoiser):
        return backbone.denoiser.blocks
    return backbone.denoiser.transformer_blocks


def deep_unet():
    """With 12 transformer blocks: more than torch.compile's recompile limit."""
    backbone = make_backbone("unet")
    backbone.denoiser = make_unet(transformer_layers_per_block=3)
    return backbone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attached_first", [True, False])
def test_compile_repeated_blocks_shares_one_graph_among_all_blocks(kind, attached_first):
    base_counter, counter = CompileCounter(), CompileCounter()
    backbone = deep_unet()
    backbone.denoiser.compile_repeated_blocks(backend=base_counter, fullgraph=True)
    run(backbone, backbone.inputs())
    torch._dynamo.reset()

    backbone = deep_unet()
    inputs = backbone.inputs()
    base = run(backbone, inputs)
    if attached_first:
        attach(backbone, kind)
        expected = run(backbone, inputs, 3.0)
        backbone.denoiser.compile_repeated_blocks(backend=counter, fullgraph=True)
    else:
        backbone.denoiser.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert torch.equal(run(backbone, inputs), base)
        counter.clear()
        attach(backbone, kind)
        with torch.compiler.set_stance("force_eager"):
            expected = run(backbone, inputs, 3.0)
    assert torch.equal(run(backbone, inputs, 3.0), expected)
    assert counter.frame_count == base_counter.frame_count
    for scale in (2.0, 4.0):
        run(backbone, {**inputs, "timestep": inputs["timestep"] // 2}, scale)
    assert counter.frame_count == base_counter.frame_count
    agd.unload(backbone.denoiser)
    assert torch.equal(run(backbone, inputs), base)


@pytest.mark.parametrize("name", ["dit", "tiny"])
def test_adapter_on_some_blocks_only_with_blocks_compiled_one_by_one(name):
    backbone = make_backbone(name)
    inputs = backbone.inputs()
    modulation = {"dit": "transformer_blocks.1.norm1.linear", "tiny": "blocks.1.modulation"}[name]
    backbone.spec = agd.DenoiserSpec(**{**vars(backbone.spec), "modulation": (agd.Site(modulation),)})
    for block in blocks_of(backbone):
        block.compile(backend="eager", fullgraph=True)
    base = run(backbone, inputs)
    attach(backbone)
    found = run(backbone, inputs, 3.0)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(found, run(backbone, inputs, 3.0))
    assert not torch.equal(found, base)
    assert torch.equal(run(backbone, inputs), base)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_training_step_has_the_eager_gradients(tiny, kind):
    tiny.denoiser.requires_grad_(False)
    adapter, inputs = attach(tiny, kind), tiny.inputs()

    def gradients(denoiser):
        adapter.zero_grad()
        with agd.guided(tiny.denoiser, 3.0):
            call(denoiser, inputs).square().sum().backward()
        return [parameter.grad.clone() for parameter in adapter.parameters()]

    compiled = torch.compile(tiny.denoiser, backend="eager", fullgraph=True)
    for found, expected in zip(gradients(compiled), gradients(tiny.denoiser), strict=True):
        assert torch.equal(found, expected)


def test_denoiser_compiled_by_inductor_is_as_exact_as_eager(tiny):
    tiny.denoiser = TinyDenoiser(layers=1).eval()
    attach(tiny)
    inputs = {**tiny.inputs(), "t": torch.tensor([0, 1, 1])}  # sinusoids of 999 lose more than this is about
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(tiny.denoiser, backend=counter, fullgraph=True)
    exact = type(tiny)(double(tiny.denoiser), tiny.spec)
    exact_inputs = {**inputs, "x": inputs["x"].double()}
    for scale in (2.0, 4.0):
        found, plain = run(tiny, inputs, scale, compiled), run(tiny, inputs, scale)
        assert_as_exact(found, plain, run(exact, exact_inputs, scale))
    assert counter.frame_count == 2
