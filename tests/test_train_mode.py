"""Mixtures of experts, some of which let gradients through in train mode alone."""

import pytest
import torch
from torch.utils._pytree import tree_map

import agd_fast as agd
from agd_fast.attaching import attachment_of
from agd_fast.distillation import TrainConfig
from agd_fast.distillation.student import Student
from agd_fast.distillation.teachers import teachers_of
from agd_fast.freezing import differentiable, frozen
from agd_fast.memory.blocks import checkpointing
from agd_fast.trajectories import Batch, collect
from helpers_families import attach_trained
from tiny import FAMILIES


def call_of(family):
    return {name: value for name, value in family.call.items() if name not in ("num_inference_steps", "output_type")}


def student_of(name, folder):
    """With an adapter that has an effect, and states of one shape."""
    family = FAMILIES[name]
    pipe = family.pipeline()
    others = dict.fromkeys(("prompts", "class_labels", "conditions", "null_condition", "guider", "scheduler", "spec"))
    [(_, teacher, table)] = teachers_of(pipe, inputs=family.inputs(1), call=call_of(family), **others)
    states = collect(teacher, table, folder, trajectories=1, guidance_range=(2.0, 4.0), steps=3, shard_size=1, progress=False)
    attach_trained(pipe, kind="gated_lora")
    return teacher, Student(teacher), states.batches(torch.arange(len(states)))[0]


def routes_of(denoiser):
    """Which experts tokens go to, or the other way round, noted at every forward."""
    found = []
    for name, module in denoiser.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(lambda _, __, output: found.append(route(output)))
    return found


def route(output):
    """HiDream's gates give the experts of every token, Nucleus' scores [B, N, E] of which every expert takes the highest half."""
    return output[0] if isinstance(output, tuple) else output.argsort(dim=1)


def in_float64(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", ["hidream", "nucleusmoe_image"])
def test_gradients_are_those_of_what_is_minimised(name, tmp_path):
    teacher, student, batch = student_of(name, tmp_path)
    with frozen(teacher.denoiser):
        plain = student(batch)
        with differentiable(teacher.denoiser, teacher.spec):
            assert torch.equal(student(batch), plain)
        student.double()
        batch, parameters = Batch(**tree_map(in_float64, vars(batch))), list(student.adapter.parameters())

        def loss():
            return (student(batch) - batch.target).square().mean()

        routes = routes_of(teacher.denoiser)
        with differentiable(teacher.denoiser, teacher.spec):
            gradients = torch.autograd.grad(loss(), parameters)
        step = 1e-4
        torch.manual_seed(0)
        directions = [torch.randn_like(one) for one in parameters]
        values = []
        with torch.no_grad():
            for sign in (step, -2 * step):
                torch._foreach_add_(parameters, directions, alpha=sign)
                values.append(loss())
    count = len(routes) // 3
    assert all(torch.equal(one, other) for at in (count, 2 * count) for one, other in zip(routes, routes[at:], strict=False))
    expected = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-2, atol=0.0)


def test_blocks_that_run_again_have_the_same_gradients(tmp_path):
    teacher, student, batch = student_of("hidream", tmp_path)
    with frozen(teacher.denoiser), differentiable(teacher.denoiser, teacher.spec):
        found = []
        for way in (checkpointing, lambda denoiser: agd.frozen_backward(denoiser, activations="exact")):
            with way(teacher.denoiser):
                found.append(torch.autograd.grad(student(batch).square().sum(), list(student.adapter.parameters())))
        plain = torch.autograd.grad(student(batch).square().sum(), list(student.adapter.parameters()))
    assert all(torch.equal(one, expected) for gradients in found for one, expected in zip(gradients, plain, strict=True))


def test_distill_puts_them_in_train_mode_while_it_takes_gradients_and_nothing_else(tmp_path):
    family = FAMILIES["hidream"]
    pipe, seen = family.pipeline(), []

    def note(module, *_):
        training = {name for name, child in module.named_modules() if child.training}
        seen.append((torch.is_grad_enabled(), training))

    pipe.transformer.register_forward_pre_hook(note)
    config = TrainConfig(steps=2, batch_size=2)
    settings = {"trajectories": 1, "sampling_steps": 2, "validation": 1, "validate_every": 1, "guidance_range": (2.5, 3.5)}
    agd.distill(
        pipe,
        output_dir=tmp_path,
        inputs=family.inputs(1),
        call=call_of(family),
        train_config=config,
        memory="blocks",
        progress=False,
        **settings,
    )
    experts = {f"{kind}_stream_blocks.0.block.ff_i" for kind in ("double", "single")}
    assert dict(seen).keys() == {True, False}
    assert all(names == (experts if taken else set()) for taken, names in seen)
    assert not any(module.training for module in pipe.transformer.modules())
    assert attachment_of(pipe.transformer) is not None
