"""One model at a time on the card, and states on disk until they are needed."""

from collections import Counter
from pathlib import Path

import accelerate.hooks
import pytest
import torch
from torch import nn

from agd_fast.distillation import residency
from agd_fast.distillation.residency import Residency
from helpers_distillation import collect_tiny
from helpers_pipeline_teacher import SD15, distill_pipe

CARD = torch.device("cpu:0")  # an accelerator to whoever compares devices; tensors on it are on the CPU


class Placed:
    """Where models are, by what their `to` was called with, and who else was on the card in each forward."""

    def __init__(self, monkeypatch, pipe, home):
        self.modules = {name: one for name, one in pipe.components.items() if isinstance(one, nn.Module)}
        self.where = dict.fromkeys(self.modules, home)
        self.forwards = Counter()
        to, pre_forward = nn.Module.to, accelerate.hooks.CpuOffload.pre_forward

        def moved(module, *args, **kwargs):
            for name, one in self.modules.items():
                if one is module:
                    self.where[name] = torch.device(args[0] if args else kwargs["device"])
            return to(module, *args, **kwargs)

        def offloading(hook, module, *args, **kwargs):
            if hook.prev_module_hook is not None:  # accelerate asks the tensors, which are on the CPU always
                hook.prev_module_hook.offload()
            return pre_forward(hook, module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "to", moved)
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", offloading)
        monkeypatch.setattr(residency, "device_of", lambda module: self.where[self._name(module)])
        for name, module in self.modules.items():
            for child in module.modules():  # a VAE decodes without a forward of its own; embedders of a UNet are asked for widths
                if not list(child.children()) and (name != "unet" or child is module.conv_in):
                    child.register_forward_pre_hook(lambda *_, name=name: self._note(name))

    def _name(self, module):
        return next(name for name, one in self.modules.items() if one is module)

    def _note(self, name):
        others = frozenset(other for other, device in self.where.items() if device == CARD and other != name)
        self.forwards[name, torch.is_grad_enabled(), self.where[name] == CARD, others] += 1


@pytest.mark.parametrize("home", [torch.device("cpu"), CARD])
def test_only_the_model_that_runs_is_on_the_card(tmp_path, monkeypatch, home):
    pipe = SD15.pipeline()
    before = {name: value for name, value in vars(pipe).items() if name.startswith("_")}
    placed = Placed(monkeypatch, pipe, home)
    of = Residency.of.__func__
    monkeypatch.setattr(Residency, "of", classmethod(lambda cls, teacher, device, *rest: of(cls, teacher, CARD, *rest)))
    distill_pipe(pipe, tmp_path, memory="4bit", base_weights="int8", validation=1, validate_every=2)
    probe = {key: count for key, count in placed.forwards.items() if key[0] == "text_encoder" and key[3]}
    if home == CARD:  # before anything is distilled, a call of the pipeline tells its shapes
        assert probe
        for key in probe:
            del placed.forwards[key]
    found = {(name, grad) for name, grad, *_ in placed.forwards}
    assert found == {("text_encoder", False), ("unet", False), ("unet", True), ("vae", False)}
    for name, grad, on_card, others in placed.forwards:
        assert (on_card or (home != CARD and name == "text_encoder")) and not others, (name, grad, on_card, others)
    assert set(placed.where.values()) == {home}
    assert {name: value for name, value in vars(pipe).items() if name.startswith("_") and name in before} == before
    assert not getattr(pipe, "_all_hooks", None)
    assert not any(hasattr(module, "_hf_hook") for module in placed.modules.values())


def test_a_pipeline_that_is_offloaded_goes_on_so(tmp_path):
    pipe = SD15.pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = len(pipe._all_hooks)
    distill_pipe(pipe, tmp_path, memory="4bit")
    assert len(pipe._all_hooks) == hooks > 0


def test_states_are_read_from_disk_as_they_are_needed(tmp_path):
    """Nothing of a shard is in memory but pages that the system may drop: its tensors are those of the mapped file."""
    states = collect_tiny(tmp_path)
    for shard in states.shards:
        for tensor in shard.values():
            assert not tensor.is_pinned()
            if tensor.numel():
                assert tensor.untyped_storage().nbytes() >= tensor.nbytes
    file = next(tmp_path.glob("shard-*.safetensors"))
    assert str(file) in Path("/proc/self/maps").read_text()
