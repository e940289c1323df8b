"""Memory that several tensors of a graph share: what is written there, when it is read, and what of it a caller sees."""

import pytest
import torch
import triton
import triton.language as tl
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
from torch.nn import functional as F

from agd_fast.graph.capture import NotCapturableError, capture
from helpers_fusing import as_list, rewritten, x


def into_an_argument_by_name(x):
    place = torch.zeros_like(x)
    view = place.view(-1)
    before = view.sin()
    torch.add(x, 1, out=place)
    return before, view.sin()


def into_each_of_a_list(x):
    one, other = x + 1, x + 2
    before = other.sin()
    torch._foreach_mul_([one, other], 3.0)
    return before, other.sin()


def into_a_view_that_no_schema_tells(x):
    whole = x.sin()
    turned = torch.einsum("btc->bct", whole)
    before = whole.cos()
    turned.mul_(2)
    return before, whole.cos()


def into_what_is_not_dropped(x):
    whole = x.sin()
    same = F.dropout(whole, 0.5, training=False)
    before = whole.cos()
    same.mul_(2)
    return before, whole.cos()


def into_another_input(x, y):
    before = y.sin()
    x.mul_(2)
    return before, y.sin()


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        into_an_argument_by_name,
        into_each_of_a_list,
        into_a_view_that_no_schema_tells,
        into_what_is_not_dropped,
        into_another_input,
    ],
)
def test_what_is_read_before_and_after_a_write_is_not_the_same(function):
    def given():
        one = x.clone()
        return (one, one[:2]) if function is into_another_input else (one,)

    def tripled(*inputs):  # two results never become one; what they are made of may
        return tuple(one * 3 for one in function(*inputs))

    found, _ = rewritten(tripled, *given(), policy="never")
    for one, plain in zip(found, tripled(*given()), strict=True):
        torch.testing.assert_close(one, plain)


@torch.no_grad()
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 1,
        lambda x: x.to(x.dtype, copy=True),
        lambda x: (x * 1).view(-1) + 0,
        lambda x: (x.sin(), x.sin()),
        lambda x: (lambda h: (h, h / 1))(x.sin()),
        lambda x: (x.sin() * 1, x.sin(), (x.sin() * 1) * 1),
        lambda x: ((x.sin() * 1).view(-1), x.sin()),
        lambda x: (lambda h: ((h * 1).view(-1) + 0, h * 1))(x.sin()),
    ],
)
def test_results_lie_in_memory_of_their_own(function):
    found, _ = rewritten(function, x, policy="never")
    assert len({one.untyped_storage().data_ptr() for one in (x, *found)}) == 1 + len(found)
    for one, plain in zip(found, as_list(function(x)), strict=True):
        assert torch.equal(one, plain)


@triton.jit
def add_one(x, out, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, tl.load(x + places) + 1)


def with_a_kernel_of_its_own(x):
    out, kernel = torch.zeros_like(x), kernel_side_table.add_kernel(add_one)
    triton_kernel_wrapper_mutation(
        kernel_idx=kernel,
        constant_args_idx=kernel_side_table.add_constant_args({"SIZE": x.numel()}),
        grid=[(1, 1, 1)],
        tma_descriptor_metadata={},
        kwargs={"x": x, "out": out},
    )
    return [out]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: [F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True)], "updates the statistics of a norm"),
        (lambda x: [F.instance_norm(x.mT[None], torch.zeros(4), torch.ones(4))], "updates the statistics of a norm"),
        (with_a_kernel_of_its_own, "calls triton_kernel_wrapper_mutation, which does not say what it writes to"),
    ],
)
def test_forwards_that_write_where_nothing_says_so_are_none_to_capture(function, message):
    with pytest.raises(NotCapturableError, match=message):
        capture(function, [torch.ones(2, 4)])


def test_norms_that_keep_their_statistics_are_captured():
    found = capture(lambda x: [F.batch_norm(x, x[0], x[1]), F.batch_norm(x, None, None, training=True)], [torch.ones(2, 4)])
    assert len(found.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)) == 2
