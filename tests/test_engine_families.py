"""Every family on the engine: its pipeline's call as before, each forward as exact as before, and what is hoisted from a step."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from diffusers.pipelines.skyreels_v2 import pipeline_skyreels_v2_diffusion_forcing
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import agd_fast as agd
from agd_fast.attaching import guided, scoped, to_omega
from agd_fast.engine import engine_of
from agd_fast.forward import forward_parameters
from agd_fast.graph import repeats
from agd_fast.graph.repeats import calls_of
from conftest import assert_as_exact
from helpers_engine import RECORDED, Reading, assert_same, in_pieces, own_forwards, programs, reasons, tables
from helpers_families import Forward, attach_trained, denoisers, exact_output, run, spec_for
from tiny import FAMILIES
from tiny._parts import quiet

PLAIN = {"hidream": "values of a tensor that depends on x_t"}
FORWARDS = {"joyimage_plus": 2, "unet3d": 2}  # that are captured: x_t lies otherwise from the second step on
NOT_AHEAD = ("cosmos",)  # whose t is none of the scheduler's timesteps, which are rounded
CAPTURED = [name for name in FAMILIES if name not in PLAIN]
KINDS = [(name, kind) for name in ("sd15", "dit", "pixart", "sd3") for kind in ("cross_attention", "offset")]


@dataclass
class Call:
    """One forward as a pipeline makes it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def stacked(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else output[0]
    return torch.stack(found) if isinstance(found, list) else found


def record(pipe: Any, family: Any, **arguments: Any) -> tuple[Tensor, dict[str, list[Call]]]:
    """What a call gives, and the forwards of each denoiser in it; what is the same at all steps is the same tensors."""
    calls: dict[str, list[Call]] = {name: [] for name in denoisers(pipe)}

    def watch(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves, tree = tree_flatten((args, kwargs))
            leaves = [leaf.clone() if isinstance(leaf, Tensor) and 0 not in leaf.stride() else leaf for leaf in leaves]
            if calls[name]:
                first = tree_flatten((calls[name][0].args, calls[name][0].kwargs))[0]
                pairs = zip(first, leaves, strict=True)
                leaves = [one if isinstance(one, Tensor) and torch.equal(one, own) else own for one, own in pairs]
            calls[name].append(Call(*tree_unflatten(leaves, tree), stacked(output).clone()))

        return note

    handles = [one.register_forward_hook(watch(name), with_kwargs=True) for name, one in denoisers(pipe).items()]
    found = run(pipe, family, **arguments)
    for handle in handles:
        handle.remove()
    return found, calls


def named(denoiser: nn.Module, call: Call) -> dict[str, Any]:
    return {**dict(zip(forward_parameters(denoiser), call.args, strict=False)), **call.kwargs}


@torch.no_grad()
def assert_each_as_exact(pipe: Any, calls: dict[str, list[Call]], scales: list[float], ahead: bool = True) -> None:
    """Each recorded forward again, on the engine, in a scope of the schedule; ahead: whether that is known before its steps."""
    spec = spec_for(pipe)
    for index, (name, denoiser) in enumerate(denoisers(pipe).items()):
        scale = [scales[min(index, len(scales) - 1)]] * 2
        omega = to_omega(scale, spec)
        exact = [exact_output(denoiser, Forward(name, named(denoiser, call), call.output, 2), omega) for call in calls[name]]
        with scoped(denoiser, pipe.scheduler.timesteps), guided(denoiser, scale), own_forwards(denoiser) as seen:
            found = [stacked(denoiser(*call.args, **call.kwargs)) for call in calls[name]]
            assert bool(tables(denoiser)) == ahead
        assert not seen
        plain = [call.output for call in calls[name]]
        assert_as_exact(torch.stack(found), torch.stack(plain), torch.stack(exact))


def scales_of(family: Any) -> list[float]:
    return [value for value in family.guided.values() if isinstance(value, float)]


@pytest.mark.parametrize(("name", "kind"), [*((name, None) for name in CAPTURED), *KINDS])
def test_a_pipeline_is_as_before_and_each_forward_as_exact(monkeypatch, name, kind):
    monkeypatch.setattr(repeats, "LEAST", 1)  # these have few blocks
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe, kind=kind)
    plain, calls = record(pipe, family, **family.guided)
    agd.optimize(pipe)
    forwards = FORWARDS.get(name, 1)
    for runs in (forwards * RECORDED, 0):
        for denoiser in denoisers(pipe).values():
            with own_forwards(denoiser) as seen:
                found = run(pipe, family, **family.guided)
            assert len(seen) in (runs, 0)
        assert_same(found, plain)
    for program in [one for denoiser in denoisers(pipe).values() for one in programs(denoiser)]:
        program.body = in_pieces(program.parts.body, calls_of(program.parts.body.module.graph))
    assert torch.equal(run(pipe, family, **family.guided), found)
    assert [engine_of(denoiser).info()["plain_because"] for denoiser in denoisers(pipe).values()] == [[]] * len(denoisers(pipe))
    assert all(engine_of(denoiser).info()["captured"] == forwards for denoiser in denoisers(pipe).values())
    assert_each_as_exact(pipe, calls, scales_of(family), ahead=name not in NOT_AHEAD)


@pytest.mark.parametrize(("name", "steps"), [("sd3", 28), ("qwenimage", 4), ("qwenimage", 50), ("wan", 50)])
def test_schedules_in_low_precision_are_as_exact_at_every_step(name, steps):
    """Pipelines round their timesteps before or after they scale them, and two steps do not tell which."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe)
    pipe.to(torch.bfloat16)
    _, calls = record(pipe, family, **{**family.guided, "num_inference_steps": steps})
    agd.optimize(pipe)
    for _ in range(2):
        assert run(pipe, family, **{**family.guided, "num_inference_steps": steps}).isfinite().all()
    assert_each_as_exact(pipe, calls, scales_of(family))


@pytest.mark.parametrize("name", PLAIN)
def test_a_family_that_cannot_be_captured_runs_as_it_is_and_says_once_why(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe)
    plain = run(pipe, family, **family.guided)
    agd.optimize(pipe)
    with pytest.warns(UserWarning, match="runs as it is, not optimized: its forward cannot be recorded"):
        assert torch.equal(run(pipe, family, **family.guided), plain)
    (reason,) = reasons(pipe)
    assert PLAIN[name] in reason
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not optimized")
        assert torch.equal(run(pipe, family, **family.guided), plain)


@pytest.mark.parametrize("name", ["sd15", "dit", "sd3"])
def test_the_bases_own_guidance_runs_on_the_engine(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    plain = run(pipe, family, **family.guided)
    agd.optimize(pipe)
    (denoiser,) = denoisers(pipe).values()
    with own_forwards(denoiser) as seen:
        for _ in range(2):
            assert_same(run(pipe, family, **family.guided), plain)
    assert len(seen) == RECORDED


def test_guidance_by_two_forwards_one_after_another_runs_on_the_engine():
    family = FAMILIES["wan"]
    pipe = family.pipeline()
    plain = run(pipe, family, **family.guided)
    agd.optimize(pipe)
    with own_forwards(pipe.transformer) as seen:
        for _ in range(2):
            assert_same(run(pipe, family, **family.guided), plain)
    assert len(seen) == RECORDED
    (program,) = programs(pipe.transformer)
    assert len(program.levels) == 3 and program.levels.count(2) == 1  # both prompts stay what does not move


# name, kind: modules that a step has no use for, and one that it has
HOISTED = [
    ("sd15", None, ["attn2.to_k", "attn2.to_v", "time_embedding.linear_1", "time_emb_proj"], "attn2.to_q"),
    ("sdxl", None, ["attn2.to_k", "attn2.to_v", "time_embedding.linear_1", "add_embedding.linear_1"], "attn2.to_q"),
    ("sd15", "cross_attention", ["attn2.to_k", "attn2.to_v", "time_embedding.linear_1", "time_emb_proj"], "attn2.to_q"),
    ("dit", None, ["norm1.linear", "proj_out_1", "timestep_embedder.linear_1"], "attn1.to_k"),
    ("pixart", None, ["attn2.to_k", "attn2.to_v", "adaln_single.linear", "caption_projection.linear_1"], "attn2.to_q"),
    ("sd3", None, ["norm1.linear", "norm1_context.linear", "norm_out.linear", "context_embedder"], "attn.to_k"),
    ("qwenimage", None, ["img_mod.1", "txt_mod.1", "norm_out.linear", "txt_in"], "attn.to_k"),
    ("wan", None, ["attn2.to_k", "attn2.to_v", "time_proj", "time_embedder.linear_1"], "attn2.to_q"),
    (
        "lumina2",
        None,
        ["context_refiner.0.attn.to_k", "norm1.linear", "norm_out.linear_1", "timestep_embedder.linear_1"],
        "layers.0.attn.to_k",
    ),
    (
        "zimage",
        None,
        ["context_refiner.0.attention.to_k", "layers.0.adaLN_modulation.0", "t_embedder.mlp.0"],
        "layers.0.attention.to_k",
    ),
    (
        "kandinsky5",
        None,
        ["text_transformer_blocks.0.self_attention.to_key", "visual_modulation.out_layer"],
        "visual_transformer_blocks.0.self_attention.to_key",
    ),
    (
        "audioldm2",
        None,
        ["attentions.1.transformer_blocks.0.attn2.to_k", "attentions.2.transformer_blocks.0.attn2.to_v", "time_emb_proj"],
        "attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    (
        "longcat_audio",
        None,
        ["text_conv_layer.0.pwconv1", "adaln_global_mlp.mlp.1", "cross_attn.to_k", "norm_out.linear"],
        "self_attn.to_k",
    ),
    ("hunyuanvideo15", None, ["token_refiner.refiner_blocks.0.attn.to_k", "norm1.linear"], "transformer_blocks.0.attn.to_k"),
]


@pytest.mark.parametrize(("name", "kind", "hoisted", "moving"), HOISTED)
def test_what_does_not_move_with_x_is_not_read_in_a_step(name, kind, hoisted, moving):
    family = FAMILIES[name]
    pipe = family.pipeline()
    attach_trained(pipe, kind=kind)
    _, calls = record(pipe, family, **family.guided)
    (denoiser,), (steps,) = denoisers(pipe).values(), calls.values()
    modules = {path: [one for full, one in denoiser.named_modules() if f".{full}".endswith(f".{path}")] for path in hoisted}
    with torch.no_grad(), guided(denoiser, scales_of(family)[0]), Reading() as before:
        denoiser(*steps[2].args, **steps[2].kwargs)
    agd.optimize(pipe)
    with torch.no_grad(), scoped(denoiser, pipe.scheduler.timesteps), guided(denoiser, scales_of(family)[0]):
        for call in steps[:2]:
            denoiser(*call.args, **call.kwargs)
        with Reading() as reading:
            denoiser(*steps[2].args, **steps[2].kwargs)
        (table,) = tables(denoiser)
    assert reading.operations < before.operations
    assert all(modules.values()) and all(any(map(before.has_read, found)) for found in modules.values())
    assert not [path for path, found in modules.items() if any(map(reading.has_read, found))]
    assert all(reading.has_read(one) for full, one in denoiser.named_modules() if f".{full}".endswith(f".{moving}"))
    (count,) = {len(rows) for rows in table.rows.values()}
    assert len(steps) < count <= 2 * len(steps) + 1  # a step may be passed in two roundings; one row is for none of them
    assert agd.info(pipe)["engine"]["ahead_bytes"] >= table.bytes > 0


def test_frames_whose_timesteps_come_to_differ(monkeypatch):
    """Diffusion forcing: all begin at one, then each block of frames is some steps behind the one before it."""
    monkeypatch.setitem(vars(pipeline_skyreels_v2_diffusion_forcing), "ftfy", SimpleNamespace(fix_text=str))
    family, outputs = FAMILIES["skyreels"], []
    staggered = {"num_frames": 9, "base_num_frames": 9, "num_inference_steps": 4, "ar_step": 2, "causal_block_size": 1}
    for optimized in (False, True):
        pipe = quiet(SkyReelsV2DiffusionForcingPipeline(**family.pipeline().components))
        pipe.transformer._set_ar_attention(1)
        if optimized:
            agd.optimize(pipe)
        outputs.append(run(pipe, family, (0,), **staggered))
    assert not reasons(pipe)
    assert_same(outputs[1], outputs[0])
