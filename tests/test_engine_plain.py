"""Where the engine leaves the plain path in place, and says why."""

import threading
import warnings

import accelerate
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor2_0

import agd_fast as agd
from agd_fast.engine.fingerprint import Fingerprint
from helpers_engine import (
    RECORDED,
    SCALE,
    assert_same,
    call,
    own_forwards,
    programs,
    reasons,
    small_pipeline,
    twins,
)
from helpers_pipelines import attach, model

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def pair():
    return twins()


def assert_plain(pair, reason):
    """As the plain pipeline, bit for bit, with one warning that says why."""
    plain, fast = pair
    with pytest.warns(UserWarning, match="runs as it is, not optimized") as found:
        assert torch.equal(call(fast), call(plain))
    assert len([one for one in found if "not optimized" in str(one.message)]) == 1
    (stated,) = reasons(fast)
    assert reason in stated
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not optimized")
        for _ in range(2):
            assert torch.equal(call(fast), call(plain))


def offload(pipe):
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))


def put_hook(pipe):
    accelerate.hooks.add_hook_to_module(pipe.unet.conv_in, accelerate.hooks.AlignDevicesHook(execution_device="cpu"))


def offload_groups(pipe):
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1)


def cast_layers(pipe):
    apply_layerwise_casting(pipe.unet, storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def put_foreign_hook(pipe):
    pipe.unet.conv_out.register_forward_hook(lambda module, args, output: output * 0.5)


def compile_blocks(pipe):
    pipe.unet.compile_repeated_blocks(backend="eager")


class Counting(AttnProcessor2_0):
    calls = 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return super().__call__(*args, **kwargs) * (1 + 0.1 * self.calls)


class Keeping(AttnProcessor2_0):
    table = None

    def __call__(self, *args, **kwargs):
        if self.table is None:
            self.table = torch.full((1,), 1.5)
        return super().__call__(*args, **kwargs) * self.table


OBSTACLES = {
    "offloaded by accelerate": (offload, "accelerate's"),
    "hook of accelerate": (put_hook, "accelerate's AlignDevicesHook acts on conv_in"),
    "offloaded by groups": (offload_groups, "diffusers' hook 'group_offloading'"),
    "cast by layers": (cast_layers, "diffusers' hook 'layerwise_casting'"),
    "foreign hook": (put_foreign_hook, "conv_out (Conv2d) has a hook that is not ours"),
    "compiled by blocks": (compile_blocks, "is compiled by itself"),
    "counts its calls": (lambda pipe: pipe.unet.set_attn_processor(Counting()), "its forward changes the model"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_model_that_cannot_be_captured_says_why(pair, name):
    change, reason = OBSTACLES[name]
    for pipe in pair:
        change(pipe)
    assert_plain(pair, reason)


@pytest.mark.parametrize("name", [name for name in OBSTACLES if name != "compiled by blocks"])
def test_a_model_that_can_no_longer_be_captured_says_why(pair, name):
    assert_same(call(pair[1]), call(pair[0]))
    change, reason = OBSTACLES[name]
    for pipe in pair:
        change(pipe)
    assert_plain(pair, reason)


def test_a_model_that_changes_in_every_forward_is_looked_at_no_longer(pair, monkeypatch):
    plain, fast = pair
    for pipe in pair:
        pipe.unet.set_attn_processor(Counting())
    made = []

    class Counted(Fingerprint):
        def __init__(self, roots):
            made.append(1)
            super().__init__(roots)

    monkeypatch.setattr("agd_fast.engine.engine.Fingerprint", Counted)
    arguments = {"callback_on_step_end": lambda pipe, step, t, kwargs: kwargs, "num_inference_steps": 6}
    with pytest.warns(UserWarning, match="changes the model"):
        assert_same(call(fast, **arguments), call(plain, **arguments))
    assert len(made) == 4  # of the model, and of what the forward changes, for two forwards


def test_what_stood_in_the_way_may_go_again(pair):
    plain, fast = pair
    handle = fast.unet.conv_out.register_forward_hook(lambda module, args, output: output * 0.5)
    with pytest.warns(UserWarning, match="not optimized"):
        call(fast)
    handle.remove()
    with own_forwards(fast.unet) as seen:
        for _ in range(2):
            assert_same(call(fast), call(plain))
    assert len(seen) == RECORDED
    assert reasons(fast) == []


def test_what_the_first_forward_keeps_for_all_others_is_no_change(pair):
    plain, fast = pair
    for pipe in pair:
        pipe.unet.set_attn_processor(Keeping())
    with own_forwards(fast.unet) as seen:
        for _ in range(2):
            assert_same(call(fast), call(plain))
    assert len(seen) == 1 + RECORDED and not reasons(fast)


def test_a_timestep_that_is_a_number_is_no_input():
    this = model("unet")
    attach(this.denoiser)
    expected = this(SCALE, timestep=7)
    agd.optimize(this.denoiser)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="its timestep is a int; expected a tensor"):
            assert torch.equal(this(SCALE, timestep=7), expected)
        assert torch.equal(this(SCALE, timestep=7), expected)


def test_gradients_training_and_autocast_take_the_plain_path():
    this, fast = model("unet"), model("unet")
    for one in (this, fast):
        attach(one.denoiser)
    agd.optimize(fast.denoiser)
    assert torch.equal(fast(SCALE), this(SCALE))
    found = [one(SCALE).square().mean() for one in (this, fast)]
    for one in found:
        one.backward()
    pairs = zip(this.attachment.adapter.parameters(), fast.attachment.adapter.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                assert torch.equal(fast(SCALE), this(SCALE))
        for one in (this, fast):
            one.denoiser.train()
        for _ in range(2):
            assert torch.equal(fast(SCALE), this(SCALE))
    assert agd.info(fast.denoiser)["engine"]["captured"] == 0


def test_gradients_after_captured_forwards_are_those_of_the_plain_path():
    this, fast = model("dit"), model("dit")
    for one in (this, fast):
        attach(one.denoiser)
    agd.optimize(fast.denoiser)
    with torch.no_grad():
        for _ in range(2):
            fast(SCALE)
    for one in (this, fast):
        one(SCALE).square().mean().backward()
    pairs = zip(this.attachment.adapter.parameters(), fast.attachment.adapter.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_a_compiler_that_fails_is_done_without(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: fails)
    plain, fast = twins()
    agd.optimize(fast, agd.EngineConfig(compile=True))
    with pytest.warns(UserWarning, match="optimized in part: torch.compile failed .RuntimeError: no compiler here"):
        assert_same(call(fast), call(plain))
    info = agd.info(fast)["engine"]
    assert info["captured"] == 1 and not info["plain_because"] and "run uncompiled" in info["slower_because"][0]


def test_models_that_are_captured_in_two_threads_at_once():
    pipes = [small_pipeline(), small_pipeline()]
    for pipe in pipes:
        attach(pipe)
    expected = call(pipes[0])
    start, found = threading.Barrier(len(pipes)), {}

    def run(index):
        agd.optimize(pipes[index])
        start.wait()
        found[index] = [call(pipes[index]) for _ in range(2)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(pipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reasons(pipe) for pipe in pipes] == [[], []]
    for index, pipe in enumerate(pipes):
        assert len(programs(pipe.unet)) == 1
        for one in found[index]:
            assert_same(one, expected)
