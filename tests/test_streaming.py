"""Models that a card does not hold: their weights stay in host memory, and what comes out is the same to the last bit."""

import itertools
from contextlib import nullcontext

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import ModuleGroup
from torch import nn

import agd_fast as agd
from agd_fast import TrainConfig
from agd_fast.attaching import attachment_of
from agd_fast.distillation import job, residency
from agd_fast.distillation.residency import Residency
from agd_fast.distillation.tiling import tiled
from agd_fast.forward import device_of
from agd_fast.memory import base_weights
from agd_fast.memory.base_weights import PackedBase, packed_base
from agd_fast.memory.choose import budget_on
from agd_fast.memory.streaming import offloads, streamable, streamed
from helpers_distillation import after_calls, assert_same_tensors, contents, ddim, distill_tiny, short, unet
from helpers_pipeline_teacher import distill_pipe
from tiny import FAMILIES

CARD = torch.device("cpu:0")  # an accelerator to whoever compares devices; tensors on it are on the CPU
SDXL = FAMILIES["sdxl"]


@pytest.fixture
def card(monkeypatch):
    """Runs are on a card; how many bytes it has, None for more than anybody needs, is set by calling this."""
    of, room = Residency.of.__func__, [None]
    monkeypatch.setattr(Residency, "of", classmethod(lambda cls, teacher, device, *rest: of(cls, teacher, CARD, *rest)))
    monkeypatch.setattr(residency, "budget_on", lambda device, resident: room[0])
    return lambda size: room.__setitem__(0, size)


@pytest.fixture
def onloaded(monkeypatch):
    """Counts the layers that were brought to the card."""
    count = itertools.count()
    onload = ModuleGroup.onload_
    monkeypatch.setattr(ModuleGroup, "onload_", lambda group: (next(count), onload(group)))
    return lambda: next(count)


def set_on(modules):
    return [{name for name in vars(part) if name in ("forward", "_diffusers_hook")} for one in modules for part in one.modules()]


def modules_of(pipe):
    return [one for one in pipe.components.values() if isinstance(one, nn.Module)]


SMALL = {"family": SDXL, "inputs": SDXL.inputs(1), "guidance_range": (1.0, 1.5), "trajectories": 1, "memory": "4bit"}
SMALL["train_config"] = TrainConfig(steps=2, batch_size=2, log_every=1, checkpoint_every=1)


def test_a_distillation_with_weights_in_host_memory_is_the_same_in_every_file(tmp_path, card, onloaded):
    """States, checkpoint, validation and pictures of a pipeline whose models do not fit, with a base in int8."""
    found, settings = {}, {**SMALL, "base_weights": "int8", "validation": 1, "validate_every": 2}
    for name, room in (("whole", None), ("streamed", 1000)):
        card(room)
        pipe = SDXL.pipeline()
        before, first = {n: v.clone() for n, v in pipe.unet.state_dict().items()}, onloaded()
        result = distill_pipe(pipe, tmp_path / name, **settings)
        assert result.memory["streamed"] == (name == "streamed") == (onloaded() > first + 1)
        assert not any(set_on(modules_of(pipe)))
        assert_same_tensors(pipe.unet.state_dict(), before)
        found[name] = result.adapter.state_dict()
    assert_same_tensors(found["streamed"], found["whole"])
    whole, other = contents(tmp_path / "whole"), contents(tmp_path / "streamed")
    assert whole.keys() == other.keys() and {"samples.png", "validation/step-000002.png"} <= whole.keys()
    told = {"distill.json", "log.jsonl"}  # seconds, and that it was streamed
    assert [name for name in whole if whole[name] != other[name] and name not in told] == []


def test_a_run_that_is_stopped_while_it_streams_leaves_nothing_behind(tmp_path, card):
    card(1000)
    pipe = SDXL.pipeline()
    before = [dict(part._parameters) for one in modules_of(pipe) for part in one.modules()]

    def stop():
        assert any(set_on([pipe.unet])) and any(set_on([pipe.text_encoder])) and not any(set_on([pipe.vae]))
        raise KeyboardInterrupt

    pipe.vae._supports_group_offloading = False  # as some VAEs say

    after_calls(pipe.unet.mid_block, 2, stop)
    with pytest.raises(KeyboardInterrupt):
        distill_pipe(pipe, tmp_path, **SMALL)
    assert not any(set_on(modules_of(pipe))) and attachment_of(pipe) is None
    after = [dict(part._parameters) for one in modules_of(pipe) for part in one.modules()]
    assert all(mine[name] is value for mine, theirs in zip(after, before, strict=True) for name, value in theirs.items())


def teacher_of_unet():
    torch.manual_seed(0)
    return agd.Teacher(unet(), ddim(), null_condition={"encoder_hidden_states": torch.zeros(1, 3, 8)}, name="unet")


CONDITIONS = {"class_labels": None, "conditions": {"encoder_hidden_states": torch.randn(4, 3, 8)}, "trajectories": 2}
CONDITIONS["train_config"] = short(steps=1)


def test_a_teacher_streams_only_where_a_forward_does_not_fit(tmp_path, card, monkeypatch):
    """What is estimated, of weights, the adapter and a forward of its samples, decides to the byte."""
    monkeypatch.setattr(residency, "USABLE", 1)
    states, sizes, needed = [], [], Residency._states
    monkeypatch.setattr(Residency, "_states", lambda self, samples: sizes.append(needed(self, samples)) or sizes[-1])
    card(10**9)
    first = distill_tiny(tmp_path / "first", teacher_of_unet(), memory="8bit", **CONDITIONS)
    assert sizes[0] > sum(p.nbytes for p in unet().parameters()) + sum(p.nbytes for p in first.adapter.parameters())
    for room in (sizes[0], sizes[0] - 1):
        card(room)
        result = distill_tiny(tmp_path / str(room), teacher_of_unet(), memory="8bit", **CONDITIONS)
        assert result.memory["streamed"] == (room < sizes[0])
        states.append(contents(tmp_path / str(room) / "trajectories"))
    assert states[0] == states[1]


def test_a_forward_runs_where_its_layers_are_brought():
    denoiser = unet()
    own = HookRegistry.check_if_exists_or_initialize(denoiser.conv_in)
    with streamed([denoiser], CARD):
        assert device_of(denoiser) == CARD and own.get_hook("group_offloading")
    assert device_of(denoiser) == torch.device("cpu")
    assert denoiser.conv_in._diffusers_hook is own and not own.hooks  # which was there before


def test_what_diffusers_cannot_stream_is_not():
    assert streamable(unet())
    compiled, packed = unet(), unet().requires_grad_(False)
    PackedBase(packed, "int8").pack()
    compiled.compile()
    assert not streamable(compiled) and not streamable(packed) and not streamable(torch.compile(unet()))
    assert not streamable(agd.datasets.digits_teacher().denoiser)  # says so itself
    vae = SDXL.pipeline().vae
    assert vae.config.force_upcast and streamable(vae) and not streamable(vae.half())  # SDXL's goes to float32 in mid-call
    quantised = nn.Linear(2, 2)
    quantised.weight = type("Codes", (nn.Parameter,), {})(torch.zeros(2, 2))
    assert not streamable(quantised)


def test_what_offloads_a_pipeline_goes_on_doing_so(tmp_path, card):
    """diffusers' groups; accelerate's hooks are known too."""
    card(1000)
    pipe = SDXL.pipeline()
    pipe.enable_group_offload(onload_device=CARD, offload_device=torch.device("cpu"), offload_type="leaf_level")
    before = set_on(modules_of(pipe))
    result = distill_pipe(pipe, tmp_path, **SMALL)
    assert not result.memory["streamed"] and set_on(modules_of(pipe)) == before and any(before)
    assert agd.estimate_memory(pipe, resolution=16).rows
    assert offloads(cpu_offload(unet(), CARD)) and offloads(pipe.unet) and not offloads(unet())


def test_a_model_that_cannot_be_counted_is_streamed_by_the_size_of_its_weights(tmp_path, card):
    """As with kernels that want a card."""

    class Picky(nn.Identity):
        def forward(self, x):
            assert not x.is_meta, "Input tensors must be on cuda."
            return x

    weights = sum(p.nbytes for p in unet().parameters())
    for room, expected in ((weights * 2, False), (weights, True)):
        teacher = teacher_of_unet()
        teacher.denoiser.conv_out = nn.Sequential(teacher.denoiser.conv_out, Picky())
        card(room)
        assert distill_tiny(tmp_path / str(room), teacher, memory="8bit", **CONDITIONS).memory["streamed"] == expected


class Full:
    """Raises where a device is full, in some of the denoiser's forwards without gradients."""

    def __init__(self, denoiser, *failing):
        for count in failing:
            after_calls(denoiser, count, self.fail)

    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_states_that_ran_out_of_memory_are_collected_with_weights_in_host_memory(tmp_path, card):
    """Once, when the estimate was wrong; what is there of them is kept."""
    whole = distill_tiny(tmp_path / "whole", teacher_of_unet(), memory="8bit", **CONDITIONS)
    teacher = teacher_of_unet()
    Full(teacher.denoiser.conv_in, 3)
    with pytest.warns(
        UserWarning, match="collecting states ran out of memory .*2.00 GiB.*; going on with weights that stay in host"
    ):
        found = distill_tiny(tmp_path / "run", teacher, memory="8bit", **CONDITIONS)
    assert found.memory["streamed"] and not whole.memory["streamed"]
    assert contents(tmp_path / "run" / "trajectories") == contents(tmp_path / "whole" / "trajectories")
    assert not any(set_on([teacher.denoiser]))
    teacher = teacher_of_unet()
    Full(teacher.denoiser.conv_in, 3, 4)
    with (
        pytest.raises(torch.OutOfMemoryError, match="collecting states ran out of memory .*; expected smaller samples"),
        pytest.warns(UserWarning, match="going on with weights"),
    ):
        distill_tiny(tmp_path / "small", teacher, memory="8bit", **CONDITIONS)


def test_states_of_a_run_that_saves_nothing_are_gone_on_with_in_another_way(tmp_path, card):
    teacher = teacher_of_unet()
    Full(teacher.denoiser.conv_in, 6)
    with pytest.raises(torch.OutOfMemoryError, match=r"expected one of memory='exact'.*the same output_dir goes on"):
        distill_tiny(tmp_path, teacher, **{**CONDITIONS, "shard_size": 1})
    kept = set(contents(tmp_path / "trajectories"))
    assert "shard-00000.safetensors" in kept
    card(1000)
    assert distill_tiny(tmp_path, teacher_of_unet(), memory="auto", **{**CONDITIONS, "shard_size": 1}).memory["streamed"]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_a_vae_decodes_in_tiles_and_is_set_as_before(error):
    vae = SDXL.pipeline().vae
    vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_slicing = 1024, 128, True
    before, latents = dict(vars(vae)), torch.randn(1, vae.config.latent_channels, 8, 8)
    whole = vae.decode(latents).sample
    try:
        with tiled(vae):
            assert (vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling) == (512, 64, True)
            assert torch.equal(vae.decode(latents).sample, whole)  # smaller than a tile
            vae.tile_sample_min_size, vae.tile_latent_min_size = 8, 4
            assert not torch.equal(vae.decode(latents).sample, whole)
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert dict(vars(vae)) == before
    with tiled(None), tiled(nn.Linear(1, 1)):
        pass


@pytest.mark.parametrize("name", ["kandinsky3", "longcat_audio"])
def test_a_decoder_that_knows_no_tiles_decodes_whole(name, tmp_path):
    pipe = FAMILIES[name].pipeline()
    distill_pipe(pipe, tmp_path, FAMILIES[name], memory="recompute", validation=1, train_config=short(steps=1), trajectories=1)
    assert (tmp_path / "samples.png").is_file() == (name == "kandinsky3")


@pytest.mark.parametrize("memory", [None, "8bit"])
def test_pictures_are_decoded_in_tiles_only_where_memory_is_short(tmp_path, monkeypatch, memory):
    tilings = []
    monkeypatch.setattr(job, "tiled", lambda vae: tilings.append(vae) or nullcontext())
    distill_tiny(tmp_path, memory=memory, validation=1, validate_every=1, train_config=short(steps=1), trajectories=1)
    assert len(tilings) == (0 if memory is None else 2)


def test_a_base_in_codes_is_made_on_the_card_from_host_memory(monkeypatch):
    """Weights go there one by one: here onto a device that keeps nothing."""
    packed_on, pack = [], base_weights.pack_weight
    monkeypatch.setattr(
        base_weights, "pack_weight", lambda weight, kind: packed_on.append(weight.device.type) or pack(weight, kind)
    )
    net = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)).requires_grad_(False)
    before, parameters = {n: v.clone() for n, v in net.state_dict().items()}, list(net.parameters())
    with packed_base(net, "int8", torch.device("meta")) as base:
        assert {p.device.type for p in net.parameters()} == {"meta"} and not any(p.is_meta for p in parameters)
        with base.restored():
            assert_same_tensors(net.state_dict(), before)
        assert {p.device.type for p in net.parameters()} == {"meta"}
    assert_same_tensors(net.state_dict(), before)
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    assert packed_on == ["meta"] * 4


@pytest.mark.parametrize(("fraction", "expected"), [(1.0, 30 + (50 - 40) + 5), (0.6, 60 - 40 + 5)])
def test_a_limit_of_the_process_is_the_budget(monkeypatch, fraction, expected):
    """Of a card of 100 bytes with 30 free, of which this process has reserved 50 and 40 are in use."""
    for name, value in (("mem_get_info", (30, 100)), ("memory_reserved", 50), ("memory_allocated", 40)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: {3: fraction}[device])  # an index alone
    assert budget_on(torch.device("cuda"), 5) == expected
    assert budget_on(CARD, 5) is None
