"""The engine on and off, beside what else happens to a model."""

import copy
import pickle

import pytest
import torch
from torch import nn

import agd_fast as agd
from agd_fast.attaching import attachment_of, scoped
from agd_fast.attaching.scope import scope_of
from agd_fast.attaching.wrapping import is_wrapped
from agd_fast.engine import engine_of
from agd_fast.engine.fingerprint import Fingerprint
from conftest import TINY_SPEC, assert_as_exact, make_backbone, trained
from helpers_engine import (
    RECORDED,
    SCALE,
    add_lora,
    assert_same,
    call,
    differs,
    own_forwards,
    programs,
    reasons,
    small_pipeline,
    small_unet,
    twins,
    unet_inputs,
)
from helpers_pipelines import attach, model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def pair():
    return twins()


# on and off


def test_a_call_is_recorded_once_and_captured_from_then_on(pair):
    plain, fast = pair
    expected = call(plain)
    with own_forwards(fast.unet) as seen:
        for _ in range(3):
            assert_same(call(fast), expected)
    assert len(seen) == RECORDED
    assert agd.info(plain)["engine"] is None
    found = agd.info(fast)["engine"]
    assert found.pop("ahead_bytes") > 0 and found.pop("merged") > 0 and found.pop("copied_bytes") > 0
    assert found.pop("kernels") == {} and all("tensors on cpu" in reason for reason in found.pop("not_on_kernels"))
    assert found.pop("repeated_blocks") == {} and found.pop("joined") == found.pop("gelu_epilogues") == 0
    assert found == {"compile": False, "cuda_graph": False, "captured": 1, "slower_because": [], "plain_because": []}


def test_taken_off_everything_is_as_before_bit_for_bit(pair):
    plain, fast = pair
    call(fast)
    assert agd.optimize(fast, None) is fast
    assert torch.equal(call(fast), call(plain))
    assert engine_of(fast.unet) is None and is_wrapped(fast)
    assert fast.unet._compiled_call_impl is None
    agd.optimize(fast, None)
    agd.unload(fast)
    assert not is_wrapped(fast)


def test_disabled_inside_is_the_pipelines_own_guidance(pair):
    plain, fast = pair
    found = []
    for _ in range(2):
        with agd.disabled(plain), agd.disabled(fast):
            found.append(call(plain))
            assert_same(call(fast), found[-1])
        assert_same(call(fast), call(plain))
    assert differs(found[-1], call(plain))


def test_adapters_that_come_and_go_under_the_engine():
    plain, fast = small_pipeline(), agd.optimize(small_pipeline())
    for hidden in (None, 2, None, 4):
        for pipe in (plain, fast):
            agd.unload(pipe)
            if hidden is not None:
                attach(pipe, hidden=hidden)
        expected = call(plain)
        for _ in range(2):
            assert_same(call(fast), expected)
    assert engine_of(fast.unet) is not None


def test_a_saved_adapter_loaded_under_the_engine(pair, tmp_path):
    plain, fast = pair
    other = small_pipeline()
    attach(other, hidden=4)
    agd.save(other, tmp_path)
    call(fast)
    for pipe in pair:
        agd.unload(pipe)
        agd.load(pipe, tmp_path)
    for _ in range(2):
        assert_same(call(fast), call(plain))


def test_without_an_adapter_the_pipelines_own_guidance_runs_on_it():
    plain, fast = small_pipeline(), agd.optimize(small_pipeline())
    cls = type(plain)
    with own_forwards(fast.unet) as seen:
        for _ in range(2):
            assert_same(call(fast), call(plain))
    assert len(seen) == RECORDED
    assert agd.optimize(fast, None) is fast
    assert type(fast) is cls
    assert torch.equal(call(fast), call(plain))


def test_twice_is_as_once_with_the_last_config(pair):
    plain, fast = pair
    agd.optimize(fast, agd.EngineConfig(max_table_bytes=0))
    assert engine_of(fast.unet).config.max_table_bytes == 0
    assert_same(call(fast), call(plain))
    agd.optimize(fast, None)
    assert torch.equal(call(fast), call(plain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_are_not_optimized(pair, copied):
    plain, fast = pair
    expected = call(plain)
    call(fast)
    other = copied(fast)
    assert engine_of(other.unet) is None and engine_of(fast.unet) is not None
    assert torch.equal(call(other), expected)
    assert engine_of(copied(fast.unet)) is None
    agd.optimize(other)
    for _ in range(2):
        assert_same(call(other), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
def test_copies_made_in_the_middle_of_a_call_are_outside_of_it(pair, copied):
    found = []

    def callback(pipe, step, t, tensors):
        if step == 2:
            found.append(copied(pipe.unet))
        return tensors

    call(pair[1], callback_on_step_end=callback)
    assert scope_of(found[0]) is None
    assert attachment_of(found[0]).omega is None


def test_copies_made_inside_guided_are_outside_of_it():
    denoiser = small_unet()
    attach(denoiser)
    with agd.guided(denoiser, SCALE):
        other = copy.deepcopy(denoiser)
    assert scope_of(other) is None


def test_a_denoiser_alone_is_optimized_inside_guided():
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    agd.optimize(fast)
    given = unet_inputs()
    with torch.no_grad(), own_forwards(fast) as seen:
        assert torch.equal(fast(**given).sample, plain(**given).sample)  # outside of guided: as it is
        seen.clear()
        with agd.guided(plain, SCALE), agd.guided(fast, SCALE):
            for _ in range(3):
                assert_same(fast(**given).sample, plain(**given).sample)
        assert len(seen) == RECORDED
        assert torch.equal(fast(**given).sample, plain(**given).sample)


def test_a_compiled_denoiser_is_refused():
    for compiled in (lambda denoiser: torch.compile(denoiser, backend="eager"), lambda denoiser: denoiser.compile() or denoiser):
        with pytest.raises(ValueError, match=r"compiled by torch.compile already.*EngineConfig\(compile=True\)"):
            agd.optimize(compiled(small_unet()))


def test_an_unknown_denoiser_needs_a_spec(tiny):
    with pytest.raises(TypeError):
        agd.optimize(tiny.denoiser)
    assert agd.optimize(tiny.denoiser, spec=TINY_SPEC) is tiny.denoiser


def test_a_negative_bound_of_tables_is_refused():
    with pytest.raises(ValueError, match="max_table_bytes must not be negative, found -1"):
        agd.EngineConfig(max_table_bytes=-1)


def test_random_numbers_are_drawn_as_before(pair):
    states = []
    for pipe in pair:
        torch.manual_seed(5)
        found = call(pipe, generator=None)
        states.append((found, torch.get_rng_state()))
    assert_same(states[1][0], states[0][0])
    assert torch.equal(states[0][1], states[1][1])


# kinds of denoisers that are not of diffusers, and forwards of several forms


@pytest.mark.parametrize("kind", ["modulation", "offset", "cross_attention", "gated_lora"])
@pytest.mark.parametrize("name", ["tiny", "dit", "unet"])
def test_a_denoiser_of_any_kind_is_as_exact(name, kind):
    backbone = make_backbone(name)
    trained(agd.attach(backbone.denoiser, agd.AdapterConfig(kind, 4), spec=backbone.spec))
    exact = make_backbone(name)
    exact.denoiser = copy.deepcopy(backbone.denoiser).double()
    attachment_of(exact.denoiser).adapter.double()
    given = [backbone.inputs(seed=seed) for seed in range(3)]
    wide = [{k: v.double() if v.is_floating_point() else v for k, v in one.items()} for one in given]
    with torch.no_grad():
        with agd.guided(backbone.denoiser, SCALE), agd.guided(exact.denoiser, SCALE):
            plain, reference = [backbone(**one) for one in given], [exact(**one) for one in wide]
        agd.optimize(backbone.denoiser, spec=backbone.spec)
        with agd.guided(backbone.denoiser, SCALE):
            backbone(**given[0])
            with own_forwards(backbone.denoiser) as seen:
                found = [backbone(**one) for one in given]
    assert not seen
    assert_as_exact(torch.stack(found), torch.stack(plain), torch.stack(reference))


@torch.no_grad()
def test_positional_and_keyword_arguments_tuples_and_objects_are_all_served():
    denoiser = small_unet()
    attach(denoiser)
    given = unet_inputs()
    positional = tuple(given.values())
    with agd.guided(denoiser, SCALE):
        expected = denoiser(**given).sample
    agd.optimize(denoiser)
    with agd.guided(denoiser, SCALE):
        for _ in range(2):
            assert_same(denoiser(*positional).sample, expected)
            assert_same(denoiser(**given).sample, expected)
            (found,) = denoiser(*positional, return_dict=False)
            assert_same(found, expected)
            assert type(denoiser(**given)).__name__ == "UNet2DConditionOutput"
    assert len(programs(denoiser)) == 3


# inference mode


def test_a_pipeline_in_inference_mode(pair):
    plain, fast = pair
    expected = call(plain)
    with torch.inference_mode(), own_forwards(fast.unet) as seen:
        for _ in range(2):
            assert_same(call(fast), expected)
    assert len(seen) == RECORDED
    assert_same(call(fast), expected)
    assert not reasons(fast)


def test_conditions_made_in_inference_mode_move():
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    agd.optimize(fast)
    with torch.inference_mode():
        given = {**unet_inputs(), "encoder_hidden_states": torch.randn(2, 5, 16)}
        with agd.guided(plain, SCALE), agd.guided(fast, SCALE):
            for _ in range(3):
                assert_same(fast(**given).sample, plain(**given).sample)
                given["encoder_hidden_states"].mul_(-1)
    assert len(programs(fast)) == 1


def test_a_model_made_in_inference_mode_runs_as_it_is():
    with torch.inference_mode():
        denoiser = small_unet()
    attach(denoiser)
    agd.optimize(denoiser)
    with torch.inference_mode(), pytest.warns(UserWarning, match="was made in torch.inference_mode"), agd.guided(denoiser, SCALE):
        found = denoiser(**unet_inputs()).sample
    agd.optimize(denoiser, None)
    with torch.inference_mode(), agd.guided(denoiser, SCALE):
        assert torch.equal(denoiser(**unet_inputs()).sample, found)


@pytest.mark.parametrize("modes", [(torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)])
def test_a_denoiser_called_in_inference_mode_and_out_of_it(modes):
    plain, fast = small_unet(), small_unet()
    for denoiser in (plain, fast):
        attach(denoiser)
    agd.optimize(fast)
    times, given = torch.tensor([900, 500, 20]), unet_inputs()
    with own_forwards(fast) as seen:
        for mode in (*modes, modes[0]):
            with mode(), scoped(fast, times), agd.guided(plain, SCALE), agd.guided(fast, SCALE):
                for t in times:
                    assert_same(fast(**{**given, "timestep": t}).sample, plain(**{**given, "timestep": t}).sample)
    assert len(seen) == RECORDED and not reasons(fast)


# compiled


@torch.no_grad()
@pytest.mark.parametrize("kind", ["modulation", "cross_attention"])
def test_compiled_by_inductor_it_is_as_exact(kind):
    this = model("dit")
    attach(this.denoiser, kind=kind)
    plain, reference = this(SCALE), this.exact()(SCALE)
    agd.optimize(this.denoiser, agd.EngineConfig(compile=True))
    assert agd.info(this.denoiser)["engine"]["compile"]
    this(SCALE)
    before = torch._dynamo.utils.counters["frames"]["ok"]
    with own_forwards(this.denoiser) as seen:
        found = [this(SCALE) for _ in range(2)]
    assert not seen
    assert torch._dynamo.utils.counters["frames"]["ok"] == before  # the check of its recording has compiled it
    for one in found:
        assert_as_exact(one, plain, reference)


# agd.sample


@pytest.mark.parametrize("method", ["agd", "cfg", "unguided"])
def test_samples_of_an_optimized_teacher(method):
    found = []
    for optimized in (False, True):
        torch.manual_seed(0)
        backbone = make_backbone("dit")
        trained(agd.attach(backbone.denoiser, agd.AdapterConfig(hidden=4), spec=backbone.spec))
        teacher = backbone.teacher()
        if optimized:
            agd.optimize(teacher)
        arguments = {"guidance_scale": [2.0, 3.0, 4.0, 5.0, 2.5], "steps": 6, "method": method, "seed": 0, "batch_size": 2}
        with own_forwards(backbone.denoiser) as seen:
            found.append(agd.sample(teacher, [0, 1, 2, 3, 4], **arguments))
            found.append(agd.sample(teacher, [0, 1, 2, 3, 4], **arguments))
    assert torch.equal(found[0], found[1])
    assert_same(found[2], found[0])
    assert_same(found[3], found[0])
    assert len(seen) == 2 * RECORDED  # batches of two, and the last of one


def test_the_model_is_looked_at_between_the_steps_of_a_callers_loop_alone(monkeypatch):
    holds, looks = Fingerprint.holds, []
    monkeypatch.setattr(Fingerprint, "holds", lambda self, roots: looks.append(1) or holds(self, roots))
    backbone = make_backbone("dit")
    agd.attach(backbone.denoiser, agd.AdapterConfig(hidden=4), spec=backbone.spec)
    teacher, times = agd.optimize(backbone.teacher()), torch.tensor([900, 500, 20])
    for _ in range(2):
        looks.clear()
        agd.sample(teacher, [0, 1], steps=6)
    assert len(looks) == 1
    looks.clear()
    with torch.no_grad(), scoped(teacher, times), agd.guided(teacher, SCALE):
        for t in times:
            backbone(**{**backbone.inputs(), "timestep": t.expand(3)})
    assert len(looks) == 3 + 1  # and after the forward that is recorded anew


def test_training_an_optimized_model_leaves_the_engine_with_the_new_weights(pair):
    plain, fast = pair
    call(fast)
    for pipe in pair:
        optimizer = torch.optim.AdamW(attachment_of(pipe).adapter.parameters(), lr=0.1)
        with agd.guided(pipe.unet, SCALE):
            pipe.unet(**unet_inputs()).sample.square().mean().backward()
        optimizer.step()
    for _ in range(2):
        assert_same(call(fast), call(plain))


def test_lora_and_the_engine_in_either_order(pair):
    plain, _ = pair
    add_lora(plain)
    other = small_pipeline()
    attach(other)
    add_lora(other)
    agd.optimize(other)
    for _ in range(2):
        assert_same(call(other), call(plain))
    assert all(not isinstance(module, nn.Dropout) or not module.training for module in other.unet.modules())
