"""The operations behind the one door to kernels, on their torch reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agd_fast.ops import absorbed_attention, guidance_combine
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


def attention(dtype, hidden, output, weights, tokens, mask):
    """output + W_o·softmax(W_q·x·kᵀ/√d)·v + b a head, one after another, nothing absorbed."""
    hidden, output, tokens, *linears = (one.to(dtype) for one in (hidden, output, tokens, *weights))
    W_q, W_k, W_v, W_o, b = linears  # [heads, d, C_in], [heads, d, D], [heads, d, D], [heads, C, d], [C]
    mixed = output + b
    for q, k, v, o in zip(W_q, W_k, W_v, W_o, strict=True):
        scores = (hidden @ q.mT) @ (tokens @ k.mT).mT / math.sqrt(q.shape[0])
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        mixed = mixed + scores.softmax(-1) @ (tokens @ v.mT) @ o.mT
    return mixed


def absorbed(weights, tokens, mask, dtype):
    """A, U and the bias of the same, made in float32."""
    W_q, W_k, W_v, W_o, b = weights
    heads = len(W_q)
    A = torch.cat([tokens @ k.mT @ q / math.sqrt(q.shape[0]) for q, k in zip(W_q, W_k, strict=True)], dim=1)
    U = torch.cat([tokens @ v.mT @ o.mT + b / heads for v, o in zip(W_v, W_o, strict=True)], dim=1)
    bias = None if mask is None else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)[:, None].repeat(1, 1, heads)
    return A.to(dtype), U.to(dtype), bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
def test_absorbed_attention_is_attention(heads, masked, dtype):
    batch, queries, tokens, width, channels, inner = 3, 200, 7, 10, 12, 8
    shapes = [(heads, inner, width), (heads, inner, 6), (heads, inner, 6), (heads, channels, inner)]
    weights = [torch.randn(shape) / math.sqrt(shape[-1]) for shape in shapes] + [torch.randn(channels)]
    hidden, output = torch.randn(batch, queries, width).to(dtype), torch.randn(batch, queries, channels).to(dtype)
    context, mask = torch.randn(batch, tokens, 6), None
    if masked:
        mask = torch.arange(tokens) < torch.tensor([[7], [1], [4]])
    found = absorbed_attention(hidden, output, *absorbed(weights, context, mask, dtype), heads=heads)
    assert found.dtype == dtype and found.shape == output.shape
    plain, reference = (attention(wide, hidden, output, weights, context, mask) for wide in (dtype, torch.float64))
    assert_as_exact(found, plain, reference)
    assert (found.double() - output.double()).abs().max() > 10 * (found.double() - reference).abs().max()


def test_absorbed_attention_takes_tokens_of_any_number_of_dimensions():
    A, U = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    hidden, output = torch.randn(2, 6, 7, 4), torch.randn(2, 6, 7, 5)
    found = absorbed_attention(hidden, output, A, U)
    flat = absorbed_attention(hidden.flatten(1, 2), output.flatten(1, 2), A, U)
    assert torch.equal(found, flat.view_as(output))


def test_absorbed_attention_of_one_token_is_its_row():
    A, U, output = torch.randn(2, 1, 4), torch.randn(2, 1, 5), torch.zeros(2, 9, 5)
    assert torch.equal(absorbed_attention(torch.randn(2, 9, 4), output, A, U), U.expand(-1, 9, -1))
