"""Passes of training that are to be CUDA graphs and cannot: what then runs, and what is said."""

import ast
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from agd_fast.distillation import TrainConfig, graphed, pass_graph
from agd_fast.distillation.economy import Economy
from agd_fast.distillation.graphed import Passes
from agd_fast.distillation.pass_graph import GraphMemory, PassGraph
from helpers_distillation import after_calls, distill_tiny, short, tiny_teacher
from helpers_graphed import Recording, assert_same_training, with_and_without

pytestmark = pytest.mark.usefixtures("recorded")


CARD = torch.device("cuda", 0)
ERRORS = {
    "runtime": RuntimeError("operation not permitted when stream is capturing\nmore of it"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "another": ValueError("a model that looks"),
}


@pytest.mark.parametrize("at", ["_record", "replay"])
@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_recorded_runs_as_it_is_for_good(tmp_path, monkeypatch, name, at):
    tries = []

    def fail(self, *_):
        for place in (one.grad for one in self.parameters):
            place.fill_(torch.nan)  # left half done
        tries.append(name)
        raise ERRORS[name]

    monkeypatch.setattr(Recording, at, fail)
    reason = f"no graph of a pass could be made ({str(ERRORS[name]).splitlines()[0]})"
    with pytest.warns(UserWarning, match="goes on without CUDA graphs") as warned:
        result = with_and_without(tmp_path, train_config={"micro_batch_size": 3})
    assert tries == [name] and [str(one.message) for one in warned] == [f"training goes on without CUDA graphs: {reason}"]
    assert_same_training(tmp_path)
    assert result.passes == {"cuda_graph": False, "plain_because": reason}


def test_a_graph_for_which_there_is_no_memory_beside_others_takes_none_of_them(tmp_path, monkeypatch, recorded):
    """That of the left-over micro-batch. What its recording took is given back with all the others', which are made again."""
    record, freed = Recording._record, []

    def fail(self, *given):
        if len(self.tensors[0]) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        record(self, *given)

    monkeypatch.setattr(Recording, "_record", fail)
    give_back = Passes._give_back
    monkeypatch.setattr(Passes, "_give_back", lambda self: (freed.append(len(self._graphs)), give_back(self)))
    reason = "memory ran out for a further graph: passes of its shapes run as they are"
    with pytest.warns(UserWarning, match="for a further graph") as warned:
        result = with_and_without(tmp_path, train_config={"micro_batch_size": 3})
    assert [str(one.message) for one in warned] == [f"{reason}, not as CUDA graphs"]
    assert_same_training(tmp_path)
    assert [one.runs for one in recorded] == [1, 1 + 9 * 2] and [held for held in freed if held] == [1, 1]
    assert result.passes == {"cuda_graph": True, "plain_because": reason}


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")


def summed(weight):
    """A pass over a tensor."""

    def run(given):
        loss = (weight * given).sum()
        loss.backward()
        return loss.detach()

    return run


def test_want_of_memory_ends_no_graphs_once_there_was_one(monkeypatch, recorded):
    """Whichever of two shapes finds none first, the other may find none when it is made again. Both then wait for another way."""
    weight, record = nn.Parameter(torch.ones(())), Recording._record
    passes, run = Passes([weight], torch.device("cpu")), summed(weight)

    def batch(without=None):
        def own(self, *given):
            (out_of_memory if len(self.tensors[0]) == without else record)(self, *given)

        monkeypatch.setattr(Recording, "_record", own)
        assert passes(run, torch.ones(1)) + passes(run, torch.ones(2)) == weight.grad == 3
        passes.end_batch()
        weight.grad = None
        return len(recorded), passes.held

    with pytest.warns(UserWarning, match="for a further graph") as warned:
        assert [batch(), batch(without=2), batch(without=1)] == [(0, False), (1, False), (1, False)]
    assert len(warned) == 1 and not passes.trouble
    passes.release()
    assert [batch(), batch(), batch()] == [(1, False)] * 3
    passes.release(refused=True)
    assert [batch(), batch(), batch()] == [(1, False), (3, True), (3, True)]


def test_another_way_has_the_graphs_for_which_there_was_no_memory(tmp_path, monkeypatch, recorded):
    teacher, record, tries = tiny_teacher(), Recording._record, []

    def fail(self, *given):
        tries.append(len(self.tensors[0]))
        if tries == [3, 2]:
            out_of_memory()
        record(self, *given)

    monkeypatch.setattr(Recording, "_record", fail)
    after_calls(teacher.denoiser, 8, out_of_memory, training=True)  # two batches of 3, 3, 2 and a replay came before
    with pytest.warns(UserWarning, match="for a further graph|at step 3; going on with") as warned:
        distill_tiny(tmp_path, teacher, memory="auto", train_config=short(micro_batch_size=3))
    assert len(warned) == 2 and tries == [3, 2, 3, 2] and [one.runs for one in recorded] == [1, 1 + 8 * 2, 1 + 8]


def test_what_is_released_is_forgotten(recorded):
    """In the middle of a batch, too: what was new in it, and of what a graph was to be made."""
    weight = nn.Parameter(torch.ones(()))
    passes, run, one, two = Passes([weight], torch.device("cpu")), summed(weight), torch.ones(1), torch.ones(2)
    passes(run, one)
    passes.release()
    for given in (two, one):  # which is new, in either
        passes(run, given)
        passes.end_batch()
    passes(run, one)
    passes.release()
    passes.end_batch()
    assert not recorded


def twice(self):
    self.recorded.replay()
    self.recorded.replay()


def other_loss(self):
    self.recorded.replay()
    self.loss.mul_(1.02)


def one_gradient_more(self):
    self.recorded.replay()
    largest = max(self.parameters, key=lambda one: float(one.grad.norm()))
    largest.grad.mul_(1.02)


def not_a_number(self):
    self.recorded.replay()
    self.parameters[-1].grad.fill_(torch.nan)


def one_gradient_the_other_way(self):
    self.recorded.replay()
    max(self.parameters, key=lambda one: float(one.grad.norm())).grad.neg_()


def one_gradient_permuted(self):
    self.recorded.replay()
    largest = max(self.parameters, key=lambda one: float(one.grad.norm()))
    largest.grad.copy_(largest.grad.flatten().roll(1).view_as(largest))


OTHERS = [twice, other_loss, one_gradient_more, one_gradient_the_other_way, one_gradient_permuted, not_a_number]


@pytest.mark.parametrize("replay", OTHERS)
def test_a_graph_that_gives_something_else_is_thrown_away(tmp_path, monkeypatch, recorded, replay):
    monkeypatch.setattr(Recording, "replay", replay)
    with pytest.warns(UserWarning, match="differ from those of the pass by") as warned:
        result = with_and_without(tmp_path)
    assert len(warned) == len(recorded) == 1
    assert_same_training(tmp_path)
    assert not result.passes["cuda_graph"] and "differ from those of the pass" in result.passes["plain_because"]


def test_rounding_in_another_order_is_no_difference(tmp_path, monkeypatch, recorded):
    def rounded(self):
        self.recorded.replay()
        for one in self.parameters:
            one.grad.mul_(1.002)

    monkeypatch.setattr(Recording, "replay", rounded)
    result = distill_tiny(tmp_path)
    assert result.passes["cuda_graph"] and recorded[0].runs == 11


@pytest.mark.parametrize(("share", "kept"), [(1e-5, True), (1e-2, False)])
def test_a_gradient_that_may_be_rounding_alone_may_point_anywhere(monkeypatch, recorded, share, kept):
    def other_way(self):
        self.recorded.replay()
        self.parameters[1].grad.neg_()

    monkeypatch.setattr(Recording, "replay", other_way)
    weights = [nn.Parameter(torch.ones(())) for _ in range(2)]
    passes = Passes(weights, torch.device("cpu"))

    def run(given):
        loss = (weights[0] + share * weights[1]) * given
        loss.backward()
        return loss.detach()

    with nullcontext() if kept else pytest.warns(UserWarning, match="differ from those of the pass by 2 "):
        for _ in range(2):
            passes(run, torch.tensor(1.0))
            passes.end_batch()
    assert passes.held == kept


def test_graphs_that_leave_the_optimizer_no_memory_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(graphed, "ROOM", 10**15)
    with pytest.warns(UserWarning, match="no graph of a pass could be made"):
        result = with_and_without(tmp_path)
    assert_same_training(tmp_path)
    assert not result.passes["cuda_graph"]


def test_memory_that_runs_out_beside_graphs_takes_these_and_nothing_else(tmp_path, monkeypatch, recorded):
    own, falls = Recording.replay, []

    def fail(self):
        if self.runs == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        own(self)

    monkeypatch.setattr(Recording, "replay", fail)
    monkeypatch.setattr(Economy, "fall", lambda self, step: falls.append(step))
    with pytest.warns(UserWarning, match="memory ran out beside them at step 7") as warned:
        result = with_and_without(tmp_path, memory="auto")
    assert len(warned) == 1 and falls == []
    assert_same_training(tmp_path)
    reason = "memory ran out beside them at step 7 (CUDA out of memory)"
    assert result.passes == {"cuda_graph": True, "plain_because": reason}


def test_what_is_not_finite_is_not_compared(recorded):
    weight = nn.Parameter(torch.ones(()))
    passes = Passes([weight], torch.device("cpu"))

    def run(given):
        loss = weight * given
        loss.backward()
        return loss.detach()

    for value in (1.0, torch.inf, torch.nan):
        passes(run, torch.tensor(value))
        passes.end_batch()
        weight.grad = None
    assert not recorded and not passes.trouble
    passes(run, torch.tensor(2.0))
    passes.end_batch()
    assert [one.runs for one in recorded] == [1] and weight.grad == 2


def test_weights_that_a_pass_moves_are_brought_back(recorded, monkeypatch):
    monkeypatch.setattr(Recording, "_record", lambda self, run, memory: run())  # as Python runs in a recording
    weight, base = nn.Parameter(torch.ones(())), nn.Parameter(torch.full((), 3.0), requires_grad=False)
    model, adapter = nn.ParameterList([base]), nn.ParameterList([weight])
    passes = Passes.of(TrainConfig(), SimpleNamespace(device=torch.device("cpu")), model, adapter, host=False)

    def moving(x):
        base.data = base.data.clone()
        (weight * base * x).backward()
        return x.detach()

    passes(moving, torch.tensor(1.0))
    passes.end_batch()
    weight.grad = None
    passes(moving, torch.tensor(2.0))
    place = base.data_ptr()
    with pytest.warns(UserWarning, match="a pass gives the model's weights other memory"):
        passes.end_batch()
    assert passes.trouble and not passes.held and weight.grad == 6 and base.data_ptr() == place


class Capture:
    """A recording that is invalid in the end, which torch.cuda.graph raises."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("told", [False, True])
def test_the_allocator_is_told_of_a_recording_that_failed(monkeypatch, told):
    calls, abandoned, memory = [], [], GraphMemory.__new__(GraphMemory)
    memory.device, memory.stream, memory.pool = CARD, None, (0, 7)

    def note(name, fails=False):
        def call(*given):
            calls.append((name, *given))
            if fails:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id, or the error again")

        return call

    graph = SimpleNamespace(reset=note("reset"))
    monkeypatch.setattr(pass_graph, "_ABANDONED", abandoned)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Capture())
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", note("synchronize", fails=True))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", note("end", fails=told))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", note("release"))
    with pytest.raises(RuntimeError, match="a previous error during capture") as raised:
        PassGraph(lambda _: 1 / 0, [], torch.zeros(()), memory)
    assert isinstance(raised.value.__context__, ZeroDivisionError)
    release = [] if told else [("release", 0, (0, 7))]
    assert calls == [("reset",), ("end", 0, (0, 7)), *release, ("synchronize", CARD)] and abandoned == [graph]


def test_what_is_called_of_torch_without_its_promise_is_there():
    """As its stub says, since without CUDA there is no more of it than that."""
    stub = ast.parse(Path(torch._C.__file__).parent.joinpath("_C", "__init__.pyi").read_text(encoding="utf-8"))
    found = {node.name: ast.unparse(node.args) for node in stub.body if isinstance(node, ast.FunctionDef)}
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        assert found[name] == "device: _int, mempool_id: tuple[_int, _int]"
    assert found["_cuda_clearCublasWorkspaces"] == found["_host_emptyCache"] == ""
