"""Passes of training as CUDA graphs where there is no CUDA: what is recorded runs again on the same memory, as a graph does."""

from types import SimpleNamespace
from typing import ClassVar

import torch

from agd_fast.distillation import graphed
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.pass_graph import PassGraph
from agd_fast.files import read_tensors
from helpers_distillation import assert_same_tensors, distill_tiny, logged, short


class Recording(PassGraph):
    """Recording it computes nothing. A replay is one more run, on the tensors and the gradients that were there at that."""

    made: ClassVar[list["Recording"]] = []
    parameters: ClassVar[list[torch.Tensor]] = []

    def _record(self, run, memory):
        self.run, self.runs, self.graph = run, 0, self
        self.places = [one.grad for one in self.parameters]
        self.made.append(self)

    def replay(self):
        own = [one.grad for one in self.parameters]
        for one, place in zip(self.parameters, self.places, strict=True):
            one.grad = place
        self.run()
        for one, gradient in zip(self.parameters, own, strict=True):
            one.grad = gradient
        self.runs += 1


def record_on_host(monkeypatch):
    """The graphs that are made from here on."""
    begin = Passes.__init__

    def watched(self, parameters, *args, **kwargs):
        begin(self, parameters, *args, **kwargs)
        Recording.parameters = self.parameters or Recording.parameters

    monkeypatch.setattr(Passes, "__init__", watched)
    monkeypatch.setattr(graphed, "PassGraph", Recording)
    monkeypatch.setattr(graphed, "GraphMemory", lambda device: SimpleNamespace())
    monkeypatch.setattr(graphed, "why_plain", lambda config, *_: "switched off" if config.cuda_graph is False else "")
    Recording.made = []
    return Recording.made


def with_and_without(directory, **settings):
    """Two distillations, as they are and with graphs; the second's result."""
    config = settings.pop("train_config", {})
    results = {}
    for name, graph in (("plain", False), ("graphed", None)):
        results[name] = distill_tiny(directory / name, train_config=short(**config, cuda_graph=graph), **settings)
    return results["graphed"]


def assert_same_adapters(directory):
    for name in ("adapter.safetensors", "checkpoint.safetensors"):
        found, expected = (read_tensors(directory / one / name)[0] for one in ("graphed", "plain"))
        assert_same_tensors(found, expected)


def assert_same_training(directory):
    assert_same_adapters(directory)
    found, expected = ([without_clock(entry) for entry in logged(directory / one)] for one in ("graphed", "plain"))
    assert found == expected


def without_clock(entry):
    return {name: value for name, value in entry.items() if name != "samples_per_second"}
