"""The operations behind the one door to kernels, on their torch reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_fast.ops import guidance_combine
from conftest import assert_as_exact


def formula(uncond, cond, omega, dtype):
    rows = [u.to(dtype) + w.to(dtype) * (c.to(dtype) - u.to(dtype)) for u, c, w in zip(uncond, cond, omega, strict=True)]
    return torch.stack(rows) if rows else uncond.to(dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 5),
    shape=st.lists(st.integers(0, 9), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_guidance_combine_is_equation_6(batch, shape, dtype):
    uncond, cond = torch.randn(2, batch, *shape).to(dtype)
    omega = 1 + 5 * torch.rand(batch)
    found = guidance_combine(uncond, cond, omega)
    assert found.dtype == dtype
    assert found.shape == cond.shape
    if found.numel():
        assert_as_exact(found, formula(uncond, cond, omega, dtype), formula(uncond, cond, omega, torch.float64))


@pytest.mark.parametrize("view", [lambda x: x[::2], lambda x: x[1:], lambda x: x.mT, lambda x: x.flip(1)[..., 1:]])
def test_guidance_combine_takes_views(view):
    uncond, cond = view(torch.randn(5, 3, 4)), view(torch.randn(5, 3, 4))
    omega = torch.rand(len(cond)) * 5
    expected = guidance_combine(uncond.contiguous(), cond.contiguous(), omega)
    assert torch.equal(guidance_combine(uncond, cond, omega), expected)


def test_guidance_combine_at_zero_and_one():
    uncond, cond = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)
    assert torch.equal(guidance_combine(uncond, cond, torch.zeros(2)), uncond)
    assert torch.equal(guidance_combine(uncond, cond, torch.ones(2)), cond)
    assert torch.equal(guidance_combine(uncond, cond, torch.tensor([0.0, 1.0])), torch.stack([uncond[0], cond[1]]))


def test_guidance_combine_leaves_its_arguments_alone():
    uncond, cond, omega = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([2.0, 3.0])
    copies = uncond.clone(), cond.clone(), omega.clone()
    guidance_combine(uncond, cond, omega)
    assert all(torch.equal(x, y) for x, y in zip((uncond, cond, omega), copies, strict=True))
