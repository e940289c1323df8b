"""Low-rank terms of many weights, written at once."""

import pytest
import torch
from agd_fast_kernels.write_merged import write_merged_fwd
from torch._subclasses.fake_tensor import FakeTensorMode

from agd_fast import ops
from agd_fast.ops import choice
from agd_fast.ops.exactness import off
from agd_fast.ops.write_merged import require_exact, write_merged_ref
from helpers_kernels import channels_last

SHAPES = ((40, 70, 3), (1, 9, 16), (33, 129, 40), (64, 64, 1))  # C, K, r: full tiles and parts of them
LAYOUTS = {"contiguous": lambda one: one.contiguous(), "channels last": channels_last}


def given(dtype=torch.float32, layout="channels last", shapes=SHAPES):
    """outs, whose weights are NaN all over, bases, ups, downs."""
    torch.manual_seed(0)
    weights = [LAYOUTS[layout](torch.randn(C, K, 3, 3).to(dtype)) for C, K, _ in shapes]
    outs = [torch.full_like(one, torch.nan) for one in weights]
    ups, downs = [torch.randn(C, r).to(dtype) for C, _, r in shapes], [torch.randn(r, K).to(dtype) for _, K, r in shapes]
    return outs, [ops.centre(one) for one in outs], [ops.centre(one) for one in weights], ups, downs


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_kernel_writes_what_torch_does_and_nothing_else(dtype, layout):
    weights, outs, *parts = given(dtype, layout)
    plain, exact = ([torch.empty_like(one) for one in outs] for _ in range(2))
    exact = [one.double() for one in exact]
    write_merged_ref(plain, *parts)
    write_merged_ref(exact, *([one.double() for one in each] for each in parts))
    write_merged_fwd(outs, *parts)
    assert not off(outs, plain, exact)
    for weight in weights:
        ops.centre(weight).fill_(torch.nan)
        assert weight.isnan().all()


def test_what_no_kernel_takes():
    _, outs, bases, ups, downs = given()
    for others in (
        (outs, bases, [up.mT.contiguous().mT for up in ups], downs),
        (outs, bases, ups, [down.double() for down in downs]),
        ([ops.centre(torch.empty(40, 70, 3, 3)), *outs[1:]], bases, ups, downs),
    ):
        with pytest.raises(ValueError, match="write_merged: expected one dtype, one device and the same strides for all; found"):
            write_merged_fwd(*others)
    write_merged_fwd([], [], [], [])


def test_tables_of_the_same_memory_are_made_once(monkeypatch):
    monkeypatch.setattr("agd_fast.ops.write_merged.missing", lambda: "")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    writer, parts = ops.WriteMerged("auto"), given()[1:]
    found = [writer._look_at(*parts) or writer._tables for _ in range(2)]
    assert found[0] is found[1] and len(found[0]) == 3
    others = given()[1:]
    writer._look_at(*others)
    assert writer._tables is not found[0]
    write_merged_fwd(*others, writer._tables)
    assert all(one.isfinite().all() for one in others[0])
    writer._look_at(*others[:3], [one.double() for one in others[3]])
    assert not writer._tables  # which no kernel takes


@pytest.mark.parametrize("policy", ["auto", "always", "never"])
def test_on_a_cpu_it_is_torchs(policy):
    _, outs, *parts = given()
    expected = [torch.empty_like(one) for one in outs]
    write_merged_ref(expected, *parts)
    writer = ops.WriteMerged(policy)
    writer(outs, *parts)
    assert all(map(torch.equal, outs, expected))
    writer([], [], [], [])


def test_the_operator_says_that_it_writes():
    _, outs, *parts = given(shapes=SHAPES[:2])
    torch.library.opcheck(torch.ops.agd_fast_kernels.write_merged.default, (outs, *parts, []))
    with FakeTensorMode() as mode:
        fakes = [[mode.from_tensor(one) for one in each] for each in (outs, *parts)]
        assert torch.ops.agd_fast_kernels.write_merged(*fakes, []) is None


def test_a_kernel_that_is_wrong_is_seen():
    _, outs, *parts = given()
    write_merged_fwd(outs, *parts)
    require_exact(outs, *parts)
    outs[2][-1, -1] += 0.01
    with pytest.raises(RuntimeError, match="it is off the reference, output 0: off by"):
        require_exact(outs, *parts)


def test_a_kernel_that_fails_is_done_without(monkeypatch):
    monkeypatch.setattr(choice, "_failed", {})

    def fails():
        raise RuntimeError("no")

    with pytest.warns(UserWarning, match="write_merged runs in torch: its kernel failed"):
        assert choice.or_reference("write_merged", fails, lambda: 1, torch.zeros(1)) == 1
    assert choice.or_reference("write_merged", lambda: 2, lambda: 1, torch.zeros(1)) == 1  # from then on
