"""What agd_fast.memory.handlers keep for backward: how much, what is shared, and for how long."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import torch
from torch.nn import functional as F

from agd_fast.memory import MODES
from agd_fast.memory.interception import Run
from agd_fast.memory.provenance import Plan
from helpers_handlers import frozen, run, wanted
from helpers_memory import SMALLEST, keeping


def kept(mode, function, *inputs, plan=None):
    with keeping() as found:
        output = run(mode, function, *inputs, plan=plan)
        return found.total if output.requires_grad else 0


def test_what_is_known_of_a_tensor_goes_with_it():
    known, x = Run(SMALLEST["exact"], Plan()).provenance, wanted(4, 8)
    y, alive = x.float(), weakref.ref(x)
    known.record_cast(y, x)
    del x, y
    assert alive() is None


def test_no_activation_waits_for_the_garbage_collector():
    w, seen = frozen(3, 8), []

    def function(x):
        y = x * 2
        seen.append(weakref.ref(y))
        return F.linear(y, w)

    gc.disable()
    try:
        run("recompute", function, wanted(4, 8))
        assert seen[0]() is None
    finally:
        gc.enable()


def test_convolutions_keep_nothing_but_their_weight():
    x, w = wanted(2, 4, 6, 5), frozen(6, 2, 3, 3)
    assert kept("exact", lambda x: F.conv2d(x, w, groups=2), x) == w.nbytes


def test_a_silu_behind_a_norm_keeps_nothing_more():
    x, function = wanted(2, 4, 16, 16), partial(F.group_norm, num_groups=2)
    for mode in MODES:
        assert kept(mode, lambda x: F.silu(function(x)), x) == kept(mode, function, x)


def test_attention_that_is_not_to_run_again_is_autograds():
    q = wanted(2, 4, 64, 16)
    attend = lambda q: F.scaled_dot_product_attention(q, q, q)  # noqa: E731
    assert kept("blocks", attend, q) >= 2 * q.nbytes > kept("8bit", attend, q)  # its output too
    (expected,) = torch.autograd.grad(attend(q).square().sum(), q)
    assert torch.equal(torch.autograd.grad(run("blocks", attend, q).square().sum(), q)[0], expected)


def test_a_trainable_linear_shares_the_norm_that_it_reads():
    x, w = wanted(4, 64, 64), wanted(3, 64)
    alone = kept("8bit", lambda x: F.layer_norm(x, (64,)), x)
    assert kept("8bit", lambda x: F.linear(F.layer_norm(x, (64,)), w), x) == alone + w.nbytes


def test_of_a_cast_its_original_is_kept():
    x = torch.randn(4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    function = lambda x: F.layer_norm(x.float(), (64,)).type_as(x)  # noqa: E731
    assert kept("exact", function, x) == x.nbytes
    (expected,) = torch.autograd.grad(function(x).square().sum(), x)
    assert torch.equal(torch.autograd.grad(run("exact", function, x).square().sum(), x)[0], expected)


def test_what_is_packed_once_is_shared():
    x, w, v = wanted(4, 64, 64), wanted(3, 64), wanted(3, 64)
    alone = kept("8bit", lambda x: F.linear(x * 2, w), x)
    assert kept("8bit", lambda x: F.linear(y := x * 2, w) + F.linear(y, v), x) == alone + v.nbytes


def test_a_norm_that_nobody_reads_is_4_bit_once_that_is_known():
    x, function = wanted(2, 4, 512), lambda x: F.layer_norm(x, (512,))
    plan = Plan()
    first = kept("4bit", function, x, plan=plan)
    second = kept("4bit", function, x, plan=plan.following())
    codes, scales = 2 * 4 * 512, 2 * 4 * 512 // 64 * 2
    statistics = 2 * 4 * 8
    assert first == codes + scales + statistics
    assert second == codes // 2 + 2 * scales + statistics


def test_a_norm_that_is_read_stays_in_8_bits():
    x, w = wanted(2, 4, 512), wanted(3, 512)
    plan = Plan()
    function = lambda x: F.linear(F.layer_norm(x, (512,)), w)  # noqa: E731
    first = kept("4bit", function, x, plan=plan)
    assert kept("4bit", function, x, plan=plan.following()) == first
    assert kept("4bit", function, x, plan=Plan(frozenset())) > first  # an unread plan costs a copy of its own, and no gradient


def test_sums_of_two_copies_are_not_followed():
    """Else a block's input would be made again from what all blocks before it keep."""
    x, y, w = wanted(4, 64, 64), wanted(4, 64, 64), wanted(3, 64)
    function = lambda x, y: F.layer_norm(x, (64,)) + F.layer_norm(y, (64,))  # noqa: E731
    alone, n = kept("8bit", function, x, y), 4 * 64 * 64
    copied = n + n // 64 * 2 + 64 * 8 + w.nbytes
    assert kept("8bit", lambda x, y: F.linear(function(x, y), w), x, y) == alone + copied


def test_gated_products_keep_two_factors():
    x = wanted(4, 16, 64)
    function = lambda x: (h := x.chunk(2, dim=-1))[0] * F.gelu(h[1])  # noqa: E731
    n = 4 * 16 * 32
    assert kept("4bit", function, x) == 2 * (n // 2 + n // 32 * 2) + 32 * 8


def test_frozen_linears_are_made_again_from_what_norms_keep():
    x, w = wanted(4, 16, 64), frozen(256, 64)

    def block(x):
        h = F.linear(F.layer_norm(x, (64,)), w)
        values, gates = h.chunk(2, dim=-1)
        return values * F.gelu(gates)

    alone = kept("recompute", lambda x: F.layer_norm(x, (64,)), x)
    assert kept("recompute", block, x) == alone + w.nbytes
