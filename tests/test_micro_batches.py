"""Forwards of a few samples: what they add up to, and that nothing runs with more."""

import copy
from collections import Counter

import pytest
import torch

from agd_fast.attaching import armed, attach, attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.passes import few_at_once
from agd_fast.distillation.student import Student
from agd_fast.distillation.train import _gradients, make_accelerator
from agd_fast.forward import forward_parameters
from agd_fast.freezing import frozen
from agd_fast.trajectories import Trajectories
from conftest import assert_as_exact, trained
from helpers_distillation import collect_tiny, distill_tiny, logged, short, small, tiny_teacher
from helpers_engine import assert_same
from helpers_families import denoisers, exact_output, run, spec_for, watched
from helpers_pipeline_teacher import SD15, distill_pipe
from tiny import FAMILIES


def in_one(teacher, loss):
    """A loss and the adapter's gradients of it, as a vector of float64."""
    adapter = attachment_of(teacher).adapter
    found = torch.cat([one.double().flatten() for one in (loss, *(parameter.grad for parameter in adapter.parameters()))])
    adapter.zero_grad()
    return found


def loss_and_gradients(teacher, states, size=None):
    with frozen(teacher.denoiser):
        return in_one(teacher, _gradients(Student(teacher), states, short(), make_accelerator("no"), size))


def exact_loss_and_gradients(teacher, states):
    """In float64, from the mean over all states at once."""
    teacher = copy.deepcopy(teacher)
    teacher.denoiser.double()
    attachment_of(teacher).adapter.double()
    with frozen(teacher.denoiser):
        errors = torch.cat([Student(teacher)(batch) - batch.target.double() for batch in states])
    omega = torch.cat([batch.omega for batch in states]).double()
    loss = (errors.square().flatten(1).mean(dim=1) / ((omega - 1).square() + 0.25)).mean()
    loss.backward()
    return in_one(teacher, loss.detach())


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Teachers with an adapter, states in two lists, and their loss and gradients in float64 and in one pass a list."""
    found = []
    for seed in range(4):
        directory = tmp_path_factory.mktemp("states")
        states = [
            collect_tiny(directory / str(n), labels=[n], trajectories=4 + n, seed=seed)[torch.arange(7 + 2 * n)] for n in (0, 1)
        ]
        teacher = tiny_teacher(seed=seed)
        trained(attach(teacher, small()))
        found.append((teacher, states, exact_loss_and_gradients(teacher, states), loss_and_gradients(teacher, states)))
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 8, 99])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(drawn, size):
    """To the mean over all of it, as far as float32 goes: no further from float64 than twice what whole batches are."""
    errors = []
    for teacher, states, exact, whole in drawn:
        micro = loss_and_gradients(teacher, states, size)
        errors.append([float((one - exact).norm() / exact.norm()) for one in (micro, whole)])
    of_micro, of_whole = torch.tensor(errors).square().mean(dim=0).sqrt().tolist()
    assert 0 < of_whole < 16 * torch.finfo(torch.float32).eps and of_micro <= 2 * of_whole


def sizes_of(denoiser, name, seen):
    """Let the batch of every forward be counted by whether it keeps a history; name: of its argument x."""
    first = forward_parameters(denoiser)[0]

    def note(_, args, kwargs):
        x = {**dict(zip((first,), args, strict=False)), **kwargs}[name]
        seen[len(x), torch.is_grad_enabled()] += 1

    return denoiser.register_forward_pre_hook(note, with_kwargs=True)


def test_micro_batches_are_the_whole_memory_of_a_step(tmp_path):
    sizes, teacher = Counter(), tiny_teacher()
    sizes_of(teacher.denoiser, "hidden_states", sizes)
    distill_tiny(tmp_path / "micro", teacher, train_config=short(micro_batch_size=3))
    assert {key: count for key, count in sizes.items() if key[1]} == {(3, True): 24, (2, True): 12}
    distill_tiny(tmp_path / "whole")
    micro, whole = ([entry["loss"] for entry in logged(tmp_path / name)] for name in ("micro", "whole"))
    assert micro == pytest.approx(whole, rel=1e-5) and micro != [0.0]


@pytest.mark.parametrize("name", FAMILIES)
def test_forwards_of_one_sample_give_what_one_of_all_gives(name):
    family = FAMILIES[name]
    pipe = family.pipeline()
    with watched(pipe) as found:
        run(pipe, family, **family.guided)
    for component, denoiser in denoisers(pipe).items():
        whole = next(forward for step in found.steps for forward in step if forward.component == component)
        seen, spec = Counter(), spec_for(pipe)
        with torch.no_grad(), few_at_once(denoiser, spec, 1):
            handle = sizes_of(denoiser, spec.sample, seen)
            output = denoiser(**whole.arguments)
            handle.remove()
        output = output if isinstance(output, torch.Tensor) else output[0]
        output = torch.stack(output) if isinstance(output, list) else output
        assert seen == {(1, False): whole.size} and whole.size > 1
        assert_as_exact(output, whole.output, exact_output(denoiser, whole))
        assert denoiser._compiled_call_impl is None


def test_forwards_in_parts_are_armed_with_their_own_samples_omega():
    teacher = tiny_teacher()
    trained(attach(teacher, small()))
    conditions = {"class_labels": torch.tensor([0, 1, 2])}
    x, t, omega = torch.randn(3, 1, 4, 4), torch.tensor([900, 500, 20]), torch.tensor([1.5, 3.0, 6.0])
    with torch.no_grad():
        whole = teacher.predict_agd(x, t, conditions, omega)
        with few_at_once(teacher.denoiser, teacher.spec, 2):
            parts = teacher.predict_agd(x, t, conditions, omega)
            one = teacher.predict_agd(x[:1], t[:1], {"class_labels": torch.tensor([0])}, omega[:1])
    torch.testing.assert_close(parts, whole)
    assert not torch.equal(one, teacher.predict_agd(x[:1], t[:1], {"class_labels": torch.tensor([0])}, omega[2:]))
    with few_at_once(teacher.denoiser, teacher.spec, 1), armed(attachment_of(teacher), omega):
        sizes = []
        handle = teacher.denoiser.register_forward_pre_hook(
            lambda _, args, kwargs: sizes.append(len(kwargs["timestep"])), with_kwargs=True
        )
        teacher.predict(x, t, conditions)  # with gradients: a whole one
        handle.remove()
    assert sizes == [3]


def test_guidance_is_two_forwards_of_one_sample_each(tmp_path):
    sizes = {}
    for memory in (None, "exact"):
        pipe, sizes[memory] = SD15.pipeline(), Counter()
        sizes_of(pipe.unet, "sample", sizes[memory])
        distill_pipe(pipe, tmp_path / str(memory), memory=memory, train_config=TrainConfig(steps=2, batch_size=4))
    # of the states, and two before them to see what the scheduler is handed: one of all, one of the first row
    assert sizes[None] == {(4, False): 4 + 1, (2, False): 1, (4, True): 2}
    assert sizes["exact"] == {(1, False): 16 + 4 + 2, (4, True): 2}
    plain, parts = (Trajectories(tmp_path / name / "trajectories") for name in ("None", "exact"))
    for one, other in zip(plain.shards, parts.shards, strict=True):
        assert torch.equal(other["condition"], one["condition"])
        for name in ("sample", "target"):
            assert_same(other[name], one[name])
