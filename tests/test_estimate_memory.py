"""agd.estimate_memory: what is counted on the meta device is what a real backward keeps; the model is left alone."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import agd_fast as agd
from agd_fast.attaching import armed, attachment_of, denoiser_of, require_attachment, spec_of
from agd_fast.forward import nest
from agd_fast.memory.base_weights import packed_base
from agd_fast.memory.counting import Live, run_backward, saving, storages_of
from agd_fast.memory.estimate import MODES, count, count_forward, estimate_memory, keeping
from agd_fast.memory.streaming import streamed
from agd_fast.memory.twin import first_call, meta_twin
from helpers_memory import keeping as counted
from speed.architectures import ARCHITECTURES, build
from tiny import FAMILIES

META = torch.device("meta")
BATCH = 32
LARGE = agd.AdapterConfig(max_fraction=0.5)  # of tiny bases


def family(name):
    """A tiny pipeline, its adapter, and the arguments of its denoiser's first call."""
    tiny = FAMILIES[name]
    pipe = tiny.pipeline()
    spec = spec_of(pipe)
    call = {key: value for key, value in {**tiny.call, **tiny.inputs(BATCH)}.items() if key != "num_inference_steps"}
    arguments = first_call(pipe, spec, None, BATCH, call)
    agd.attach(pipe, LARGE)
    return pipe, spec, arguments


def real(denoiser, arguments, mode):
    """Bytes by op that the second real forward keeps, counted by other code than the estimate's."""
    attachment = require_attachment(denoiser)
    denoiser.requires_grad_(False)
    omega = torch.full((BATCH,), 3.0)
    with keeping(denoiser, mode), armed(attachment, omega):
        denoiser(**nest(arguments), return_dict=False)
        with counted(denoiser, attachment.adapter) as kept:
            output = denoiser(**nest(arguments), return_dict=False)[0]
        found = kept.by_op()
        output.sum().backward()
    return found


PLAIN = [mode for mode in MODES if mode not in ("checkpointing", "blocks")]
CASES = [("sdxl", "4bit"), *((name, mode) for name in ("dit", "pixart") for mode in PLAIN), ("sd3", "recompute")]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_equals_what_a_real_backward_keeps(name, mode):
    pipe, _, arguments = family(name)
    estimated = estimate_memory(pipe, inputs=arguments, modes=[mode]).rows[0]
    found = real(denoiser_of(pipe), arguments, mode)
    attention = {"scaled_dot_product_attention", "attention"}
    assert {op: size for op, size in estimated.by_op.items() if op not in attention} == {
        op: size for op, size in found.items() if op not in attention and size
    }
    heads = sum(module.heads for module in denoiser_of(pipe).modules() if hasattr(module, "to_q"))
    random, padding = 2 * 16 * heads, 4 * 32 * BATCH * heads  # what CUDA's kernels keep more; with a mask statistics are padded
    difference = sum(estimated.by_op[op] - found[op] for op in attention & estimated.by_op.keys())
    assert 0 <= difference <= random + (padding if name == "pixart" else 0)
    assert estimated.activations == sum(estimated.by_op.values())


def test_blocks_keep_their_inputs_as_a_real_backward_does():
    pipe, _, arguments = family("sdxl")
    estimated = estimate_memory(pipe, inputs=arguments, modes=["blocks"]).rows[0]
    assert estimated.activations == sum(real(denoiser_of(pipe), arguments, "blocks").values())
    assert estimated.by_op["checkpointed inputs"] > estimated.activations / 2
    assert not pipe.unet.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["pixart", "dit"])
def test_each_mode_keeps_less_than_the_one_before(name):
    pipe, _, arguments = family(name)
    rows = {row.mode: row for row in estimate_memory(pipe, inputs=arguments).rows}
    assert [*rows] == list(MODES)
    kept = [rows[mode].activations for mode in MODES if mode != "checkpointing"]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[1] > kept[2] > kept[3]
    assert rows["checkpointing"].activations < rows["off"].activations / 2
    assert rows["checkpointing"].working > rows["off"].working  # a block at a time is there whole
    assert all(row.total > row.weights + row.adapters + row.activations > 0 for row in rows.values())


def sdxl(**options):
    denoiser = build(ARCHITECTURES["sdxl-1024"], META, torch.bfloat16)
    return estimate_memory(denoiser, resolution=1024, modes=["off"], **options).rows[0]


def test_plain_autograd_on_sdxl():
    """Modulation before the first block, its γ at 210 layer norms and more, low-rank terms beside 34 convolutions."""
    row = sdxl()
    assert row.weights == 2 * 2_567_463_684
    assert row.activations == pytest.approx(5.850 * 2**30, rel=1e-3)
    assert row.by_op["gelu"] == 1_677_721_600  # 16 bytes a token and channel: 10·640·4096 + 60·1280·1024 of these
    assert row.adapters == row.gradients == row.optimizer // 2 == 4 * 96_716_384


@pytest.mark.parametrize(("where", "expected"), [("sample", 4.970), ("attention", 4.777)])
def test_the_base_of_sdxl_alone(where, expected):
    """Figures that are published: with a gradient of x_t, and of what is added behind each cross-attention."""
    architecture = ARCHITECTURES["sdxl-1024"]
    denoiser = build(architecture, META, torch.bfloat16).requires_grad_(False)
    x = torch.empty(1, 4, 128, 128, device=META, dtype=torch.bfloat16, requires_grad=where == "sample")
    if where == "attention":
        for name, module in denoiser.named_modules():
            if name.endswith("attn2"):
                δ = torch.zeros((), device=META, dtype=torch.bfloat16, requires_grad=True)
                module.register_forward_hook(lambda module, args, output, δ=δ: output + δ)
    with saving(denoiser) as saved:
        output = denoiser(x, torch.zeros(1, device=META), **nest(architecture.inputs(1, META, torch.bfloat16, 1)))[0]
    assert output.requires_grad
    assert saved.total == pytest.approx(expected * 2**30, rel=1e-3)


def test_resolution_and_batch_scale_what_is_kept():
    unet = FAMILIES["sdxl"].pipeline().unet
    base, wide, many = (
        estimate_memory(unet, resolution=edge, batch_size=batch, adapter=LARGE, modes=["off"]).rows[0]
        for edge, batch in ((256, 1), (512, 1), (256, 4))
    )
    assert 3.5 < wide.activations / base.activations < 4.2
    assert 3.5 < many.activations / base.activations <= 4
    assert base.weights == wide.weights == many.weights


def test_a_pipeline_is_asked_what_it_passes():
    """Its denoiser is stopped before it runs; rows beyond the second are like the second."""
    pipe = FAMILIES["sdxl"].pipeline()
    ran = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, output: ran.append(output.device))
    found = estimate_memory(pipe, resolution=16, batch_size=5, adapter=LARGE, modes=["off"])
    assert "5×4×8×8" in found.title and set(ran) == {META}
    pipe = FAMILIES["sdxl"].pipeline()
    direct = {"sample": (5, 4, 8, 8), "timestep": torch.zeros(5), "encoder_hidden_states": (5, 16, 24)}
    direct |= {"added_cond_kwargs.text_embeds": (5, 8), "added_cond_kwargs.time_ids": (5, 6)}
    assert estimate_memory(pipe.unet, inputs=direct, adapter=LARGE, modes=["off"]).rows == found.rows


def test_teachers_of_labels():
    teacher = agd.datasets.digits_teacher()
    row = estimate_memory(teacher, batch_size=16, modes=["off"]).rows[0]
    tensors = (*teacher.denoiser.parameters(), *teacher.denoiser.buffers())
    assert row.weights == sum(tensor.nbytes for tensor in tensors)
    assert row.activations > estimate_memory(teacher, batch_size=8, modes=["off"]).rows[0].activations


def test_the_model_is_left_alone():
    pipe = agd.optimize(FAMILIES["sdxl"].pipeline())
    adapter = agd.attach(pipe, LARGE)
    before = {name: (id(value), value.requires_grad) for name, value in pipe.unet.named_parameters()}
    pipe.unet.register_forward_pre_hook(lambda *_: None)
    twin = meta_twin(pipe.unet)
    assert {value.device for value in (*twin.parameters(), *attachment_of(twin).adapter.parameters())} == {META}
    estimate_memory(pipe, resolution=16, modes=["off", "checkpointing", "4bit"])
    assert {name: (id(value), value.requires_grad) for name, value in pipe.unet.named_parameters()} == before
    assert require_attachment(pipe).adapter is adapter and adapter.parts["modulation"].up.weight.device.type == "cpu"
    assert require_attachment(pipe).omega is None and not pipe.unet.is_gradient_checkpointing
    assert agd.info(pipe)["engine"] is not None


def test_another_adapter_than_the_attached_one():
    pipe, _, arguments = family("dit")
    own = estimate_memory(pipe, inputs=arguments, modes=["off"])
    other = estimate_memory(pipe, inputs=arguments, modes=["off"], adapter=agd.AdapterConfig("cross_attention", 8))
    assert "modulation" in own.title and "cross_attention" in other.title
    assert require_attachment(pipe).adapter.config.kind == "modulation"


@pytest.mark.parametrize(("name", "kind"), [("sdxl", "nf4"), ("pixart", "int8")])
def test_packed_weights_take_what_they_take(name, kind):
    pipe, _, arguments = family(name)
    denoiser = denoiser_of(pipe).requires_grad_(False)
    estimated, plain = (
        estimate_memory(pipe, inputs=arguments, modes=["off"], base_weights=held).rows[0] for held in (kind, None)
    )
    with packed_base(denoiser, kind):
        held = {storage._cdata: storage.nbytes() for storage in storages_of([denoiser])}
        assert estimated.weights == sum(held.values()) < plain.weights
    assert estimated.working >= plain.working  # a weight at a time is unpacked


def test_moments_in_host_memory():
    teacher = agd.datasets.digits_teacher()
    estimate = partial(estimate_memory, teacher)
    off, ours = (estimate(modes=[mode]).rows[0] for mode in ("off", "exact"))
    assert off.optimizer == 2 * off.adapters and ours.optimizer == 0
    assert estimate(modes=["exact"], optimizer="adamw").rows[0].optimizer == off.optimizer


def test_states_take_the_largest_model_and_what_a_forward_holds():
    pipe, spec, arguments = family("sdxl")
    found = estimate_memory(pipe, inputs=arguments, modes=["4bit"], base_weights="int8")
    models = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    sizes = [sum(t.nbytes for t in (*model.parameters(), *model.buffers())) for model in models]
    assert found.states.weights == max(sizes) > found.row("4bit").weights  # as they are, not as codes
    assert found.states.adapters == found.row("4bit").adapters
    real = count_forward(denoiser_of(pipe), spec, arguments)
    assert found.states.working == found.streamed.working == pytest.approx(real, rel=0.02)
    assert real < found.row("4bit").activations
    assert found.states.total == max(sizes) + found.states.adapters + found.states.working


@pytest.mark.parametrize("name", ["sdxl", "pixart"])
def test_streamed_weights_are_those_of_two_groups_of_diffusers(name, monkeypatch):
    """Which it brings one after another, the next while one computes."""
    pipe, _, arguments = family(name)
    groups, made = [], ModuleGroup.__init__
    monkeypatch.setattr(ModuleGroup, "__init__", lambda self, *args, **kwargs: groups.append(self) or made(self, *args, **kwargs))
    models = [one for one in pipe.components.values() if isinstance(one, nn.Module)]
    largest = []
    for model in models:
        groups.clear()
        with streamed([model], torch.device("cpu:0")):
            held = [[*g.parameters, *g.buffers, *(t for m in g.modules for t in (*m.parameters(), *m.buffers()))] for g in groups]
        largest.append(sum(sorted(sum(t.nbytes for t in tensors) for tensors in held)[-2:]))
    found = estimate_memory(pipe, inputs=arguments, modes=["off"])
    assert found.streamed.weights == max(largest) < found.states.weights


def test_nothing_fits_where_states_cannot_be_collected():
    pipe, _, arguments = family("dit")
    found = estimate_memory(pipe, inputs=arguments, modes=["4bit"])
    assert found.streamed.total == found.states.total  # diffusers does not stream it
    assert found.fits(found.row("4bit").total) == ("4bit",)
    low = replace(found, rows=tuple(replace(row, weights=0, activations=0, working=0) for row in found.rows))
    assert low.fits(found.streamed.total) == ("4bit",) and low.fits(found.streamed.total - 1) == ()


def test_what_fits():
    pipe, _, arguments = family("dit")
    found = estimate_memory(pipe, inputs=arguments, modes=["4bit", "off", "exact"])
    assert [row.mode for row in found.rows] == ["off", "exact", "4bit"]
    assert found.fits(found.row("exact").total) == ("exact", "4bit") and found.fits(0) == ()
    with pytest.raises(ValueError, match=r"mode must be one of off, exact, 4bit; found '8bit'"):
        found.row("8bit")


def test_as_text():
    pipe, _, arguments = family("dit")
    found = estimate_memory(pipe, inputs=arguments, modes=["off", "4bit"])
    text = str(found)
    assert text.startswith("DiTTransformer2DModel, modulation, 32×4×8×8")
    for part in ("weights", "adapters", "gradients", "optimizer", "activations", "gelu", "working", "total"):
        assert f"│ {part}" in text or f"│   {part}" in text
    assert "states ┃ streamed ┃" in text and f"{found.streamed.total / 2**20:.3f} │" in text
    large = replace(found, rows=tuple(replace(row, weights=2**32) for row in found.rows))
    for one, unit, size in ((found, "MiB", 2**20), (large, "GiB", 2**30)):
        assert f"{one.rows[0].total / size:.3f}" in str(one) and f"┃ {unit}" in str(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["2bit"]}, r"modes must be of off, checkpointing, exact, 8bit, 4bit, recompute, blocks .*; found '2bit'"),
        ({"base_weights": "int4"}, r"base_weights must be one of 'int8', 'nf4' or None; found 'int4'"),
        ({"optimizer": "sgd"}, r"optimizer must be one of 'adamw', 'host' or None; found 'sgd'"),
        ({"inputs": {"timestep": (1,)}}, r"inputs need 'sample'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(FAMILIES["sdxl"].pipeline().unet, adapter=LARGE, **options)


def test_a_shape_that_nobody_tells(tiny):
    with pytest.raises(ValueError, match=r"the shape of 'x' cannot be read off the config of a TinyDenoiser; expected inputs="):
        estimate_memory(tiny.denoiser, spec=tiny.spec, adapter=LARGE)
    inputs = {"x": (2, 3, 16, 16), "t": torch.zeros(2), "label": torch.zeros(2, dtype=torch.long)}
    assert estimate_memory(tiny.denoiser, spec=tiny.spec, adapter=LARGE, inputs=inputs, modes=["off"]).rows[0].activations


def test_a_forward_that_asks_for_values():
    pipe = FAMILIES["lumina2"].pipeline()
    with pytest.raises(ValueError, match=r"asks for values of tensors"):
        estimate_memory(pipe, adapter=LARGE, call=FAMILIES["lumina2"].inputs(1) | {"output_type": "latent"}, modes=["off"])


def test_an_unknown_denoiser():
    with pytest.raises(TypeError):
        estimate_memory(nn.Linear(2, 2))


def test_what_is_dropped_on_the_way_is_not_counted():
    w = torch.empty(4, 4, device=META)
    x = torch.empty(2, 4, device=META, requires_grad=True)
    with saving() as saved:
        y = F.gelu(x @ w)  # keeps what gelu is given
        dropped = F.silu(y)
        del dropped
        z = y * y
    assert z.requires_grad and dict(saved.by_op) == {"matmul": 64, "gelu": 32, "mul": 32}


def test_what_a_function_of_autograd_keeps_is_named_by_its_class():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return F.relu(x)  # which is named by itself alone

    apply, x = torch.autograd.Function.__dict__["apply"], torch.empty(2, 4, device=META, requires_grad=True)
    with saving() as saved:
        y = Square.apply(x * 2)
        z = y * y
    assert z.requires_grad and dict(saved.by_op) == {"Square": 32, "mul": 32}
    assert torch.autograd.Function.__dict__["apply"] is apply


def test_peaks_are_of_what_lives_at_once():
    """x stays, a temporary of twice its size goes; the gradients of what is trained can be left out."""
    w = torch.empty(16, 16, device=META, requires_grad=True)
    module = nn.ParameterList([w])
    live = Live([module])
    with live:
        x = torch.empty(8, 16, device=META)  # 512 bytes
        twice = torch.cat([x, x])
        del twice
        y = (x @ w).sum()
        run_backward(y)
    assert live.peak([w.grad]) == 512 + 1024
    assert live.peak() == 512 + w.grad.nbytes + 4 + 4  # y and its gradient


def test_counting_a_scope_of_ones_own():
    pipe, spec, arguments = family("dit")
    twin = meta_twin(denoiser_of(pipe))
    on_meta = {name: value.to(META) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    by_op, working = count(twin, spec, on_meta, partial(keeping, mode="off"))
    assert by_op == estimate_memory(pipe, inputs=arguments, modes=["off"]).rows[0].by_op and working > 0
    assert all(parameter.grad is None for parameter in require_attachment(twin).adapter.parameters())
