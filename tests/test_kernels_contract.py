"""What all kernels have in common: errors that name the argument, their references' parameters, shapes and gradients."""

import inspect
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agd_fast.ops import OPS
from helpers_kernels import arguments, channels_last, interpreted, outputs

ERRORS = {
    "ada_layer_norm": [({"gamma": torch.zeros(3, 8)}, "gamma must be"), ({"beta": torch.zeros(2, 8).half()}, "beta must be")],
    "norm_scores": [
        ({"A": torch.zeros(2, 4, 7)}, "A must be"),
        ({"score_bias": torch.zeros(2, 1, 4).half()}, "score_bias must be torch.float32"),
        ({"heads": 3}, "heads must divide the 4 scores, found 3"),
    ],
    "gated_residual": [
        ({"U": None}, "found P alone"),
        ({"P": None}, "found U alone"),
        ({"y": torch.zeros(2, 3, 7)}, "y must be"),
    ],
    "residual_norm": [({"y": torch.zeros(2, 4, 8)}, "y must be"), ({"gate": torch.zeros(2, 7)}, "gate must be")],
    "ada_group_norm": [
        ({"groups": 3}, "groups must divide the 8 channels, found 3"),
        ({"gamma": torch.zeros(2, 3)}, "gamma must be"),
    ],
    "guidance_combine": [({"cond": torch.zeros(2, 3, 7)}, "cond must be"), ({"omega": torch.zeros(3)}, "omega must be")],
    "guided_update": [
        ({"sample": torch.zeros(2, 3, 7)}, "sample must be"),
        ({"a": torch.zeros(3)}, "a must be"),
        ({"omega": torch.zeros(2).double()}, "omega must be torch.float32"),
    ],
    "projection_scores": [
        ({"weight": torch.zeros(8, 5)}, "weight must be"),
        ({"A": torch.zeros(2, 129, 6), "score_bias": None}, "A must have at most 128"),
        ({"heads": 3, "score_bias": None}, "heads must be 1, found 3"),
        ({"score_bias": torch.zeros(2, 1, 4).half()}, "score_bias must be torch.float32"),
    ],
    "projection_mix": [
        ({"U": None}, "found P alone"),
        ({"P": None}, "found U alone"),
        ({"gate": torch.zeros(3, 8)}, "gate must be"),
        ({"residual": torch.zeros(2, 3, 8).half()}, "residual must be torch.float32"),
    ],
    "activated_linear": [
        ({"activation": "relu"}, "activation must be one of geglu, gelu, gelu_tanh; found 'relu'"),
        ({"weight": torch.zeros(7, 6), "bias": None}, "even number of rows for geglu, found 7"),
        ({"bias": torch.zeros(9)}, "bias must be"),
    ],
    "gated_lora": [
        ({"down": torch.zeros(65, 6), "up": torch.zeros(8, 65), "gates": None}, "rank of at most 64, found 65"),
        ({"output": torch.zeros(2, 4, 8)}, "output must be"),
        ({"up": torch.zeros(4, 8)}, "up must be"),
    ],
}


@pytest.mark.parametrize(("name", "change", "message"), [(name, *case) for name in OPS for case in ERRORS[name]])
def test_errors_name_the_argument(name, change, message):
    given = {**dict(zip(inspect.signature(OPS[name].reference).parameters, arguments(name), strict=False)), **change}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        OPS[name].kernel()(**given)


@pytest.mark.parametrize("name", OPS)
def test_float64_is_refused(name):
    with pytest.raises(ValueError, match="found torch.float64"):
        interpreted(name, *arguments(name, dtype=torch.float64))


@pytest.mark.parametrize("name", OPS)
def test_launchers_have_their_references_parameters(name):
    expected = list(inspect.signature(OPS[name].reference).parameters.values())
    *parameters, config = inspect.signature(OPS[name].kernel()).parameters.values()
    assert [(one.name, one.default) for one in parameters] == [(one.name, one.default) for one in expected]
    assert (config.name, config.kind, config.default) == ("config", inspect.Parameter.KEYWORD_ONLY, None)


@pytest.mark.parametrize("name", OPS)
def test_the_package_gives_launchers_by_name(name):
    import agd_fast_kernels

    assert getattr(agd_fast_kernels, f"{name}_fwd") is OPS[name].kernel()
    assert f"{name}_fwd" in dir(agd_fast_kernels)


def test_the_package_needs_no_triton_until_a_launcher_is_asked_for():
    script = "import sys; sys.modules['triton'] = None; import agd_fast_kernels.shapes as s; s.require; hasattr(s, 'x')"
    subprocess.run([sys.executable, "-c", script], check=True)
    import agd_fast_kernels

    with pytest.raises(AttributeError, match="has no attribute 'nothing_fwd'"):
        _ = agd_fast_kernels.nothing_fwd


def in_need_of_gradients(name):
    return [arg.requires_grad_() if isinstance(arg, torch.Tensor) else arg for arg in arguments(name)]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    torch.library.opcheck(OPS[name].overload, arguments(name))
    torch.library.opcheck(OPS[name].overload, tuple(in_need_of_gradients(name)))


@pytest.mark.parametrize("name", OPS)
def test_gradients_are_the_references(name):
    given = in_need_of_gradients(name)
    tensors = [arg for arg in given if isinstance(arg, torch.Tensor)]

    def gradients(function):
        total = sum((one * one.cos()).sum() for one in outputs(function(*given)))
        return torch.autograd.grad(total, tensors)

    for found, expected in zip(gradients(OPS[name]), gradients(OPS[name].reference), strict=True):
        assert torch.equal(found, expected)


def images(name, *lasts):
    """Arguments with images [B, C, H, W], those of a true `lasts` with their channels side by side."""
    if name == "ada_group_norm":
        x, *others = arguments(name, T=15)
        shaped, others = [x.unflatten(-1, (3, 5))], others
    else:
        hidden, output, *others = arguments(name, T=15)
        shaped, others = [one.mT.unflatten(-1, (3, 5)).contiguous() for one in (hidden, output)], [*others, True]
    shaped = [channels_last(image) if last else image for image, last in zip(shaped, lasts, strict=True)]
    return *shaped, *others


IMAGES = [("ada_group_norm", True), *(("gated_lora", *lasts) for lasts in product([False, True], repeat=2))]


@pytest.mark.parametrize(("name", "lasts"), [(name, lasts) for name, *lasts in IMAGES], ids=str)
def test_operators_of_images_lie_as_they_say(name, lasts):
    """With the layout of the last image among the arguments, the operator's fake too; gradients have the right numbers."""
    given = images(name, *lasts)
    found = OPS[name](*given)
    assert found.is_contiguous() != lasts[-1] and found.is_contiguous(memory_format=torch.channels_last) == lasts[-1]
    torch.library.opcheck(OPS[name].overload, given)
    tensors = [one.requires_grad_() for one in given if isinstance(one, torch.Tensor)]
    gradients = [torch.autograd.grad(function(*given).cos().sum(), tensors) for function in (OPS[name], OPS[name].reference)]
    assert all(map(torch.equal, *gradients))


def test_references_of_images_side_by_side_copy_none():
    """And give the same layout, so that nothing is turned round to be raced against a kernel."""

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert ("copy" not in func.name() and "clone" not in func.name()) or args[0].ndim < 3, func
            return func(*args, **(kwargs or {}))

    given = images("gated_lora", True, True)
    with Copies():
        found = OPS["gated_lora"].reference(*given)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert OPS["ada_group_norm"].reference(*images("ada_group_norm", True)).is_contiguous(memory_format=torch.channels_last)
