"""Passes of training as CUDA graphs, of which `host_graph` makes what a CPU can run."""

from types import SimpleNamespace
from typing import ClassVar

import torch

from agd_fast.distillation import graphed
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.pass_graph import PassGraph
from agd_fast.files import read_tensors
from helpers_distillation import assert_same_tensors, distill_tiny, logged, short
from host_graph import HostGraph


class Recording(PassGraph):
    made: ClassVar[list["Recording"]] = []
    parameters: ClassVar[list[torch.Tensor]] = []

    def _record(self, run, memory):
        self.graph, self.recorded = self, HostGraph()
        with self.recorded:
            run()
        self.made.append(self)

    def replay(self):
        self.recorded.replay()

    @property
    def runs(self):
        return self.recorded.runs


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
