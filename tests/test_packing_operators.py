"""The packing ops as operators of torch: their schemas and fakes, and the arguments that they do not take."""

import re

import pytest
import torch

from agd_fast.memory import ops
from agd_fast.memory.ops.launching import kernels_for
from helpers_packing import arguments


def test_every_op_has_arguments():
    assert set(arguments()) == set(ops.REFERENCES)


@pytest.mark.parametrize("name", sorted(ops.REFERENCES))
def test_operator(name):
    """Its schema, fake and tracing; that it is its reference; that it takes nothing, and the meta device."""
    op, reference, args = getattr(ops, name), ops.REFERENCES[name], arguments()[name]
    torch.library.opcheck(op, args)
    found, expected = op(*args), reference(*args)
    on_meta = op(*arguments("meta")[name])
    for one, other, meta in zip(*map(as_tuple, (found, expected, on_meta)), strict=True):
        assert torch.equal(one, other) and one.is_contiguous()
        assert (meta.shape, meta.dtype, meta.device.type) == (one.shape, one.dtype, "meta")
    double = op(*arguments(dtype=torch.float64)[name])
    assert as_tuple(double)[0].dtype in (torch.float64, torch.uint8)


@pytest.mark.parametrize(("R", "n"), [(0, 48), (0, 0)])
def test_operators_take_no_elements(R, n):
    x, rstd = torch.randn(R, n), torch.rand(R)
    flat, rows = ops.pack(x, 4, 32), ops.norm_pack(x, None, rstd, 4, 32)
    assert flat[0].numel() == rows[0].numel() == rows[1].numel() == 0
    assert ops.unpack(*flat, [R, n], 4, 32, torch.bfloat16).shape == (R, n)
    assert ops.scale_unpack(x, *flat, 4, 32).shape == (R, n)
    assert ops.norm_backward(x, *rows, rstd, None, True, 1, 1, 4, 32).shape == (R, n)
    assert ops.affine_unpack(*rows, None, None, [R, n], 1, 1, 1, 4, 32, torch.float16).shape == (R, n)
    gated = ops.geglu_pack(x, x, "none", 8, 32)
    assert ops.geglu_backward(x, *gated, 8, 32).shape == (R, 2 * n)


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


x, rstd = torch.zeros(6, 48), torch.ones(6)


flat, rows = ops.pack(x, 4, 32), ops.norm_pack(x, None, rstd, 4, 32)


WRONG = {
    "pack: bits must be 4 or 8, found 5": lambda: ops.pack(x, 5, 32),
    "pack: group must be one of (32, 64, 128), found 48": lambda: ops.pack(x, 4, 48),
    "pack: x must be bfloat16, float16, float32 or float64, found torch.int64": lambda: ops.pack(x.long(), 4, 32),
    "unpack: codes must be uint8, 144 elements, found torch.uint8, 288": lambda: ops.unpack(
        *ops.pack(x, 8, 32), [288], 4, 32, torch.float32
    ),
    "unpack: scales must be bfloat16, 5 elements, found torch.bfloat16, 9": lambda: ops.unpack(
        *flat, [288], 4, 64, torch.float32
    ),
    "unpack: dtype must be": lambda: ops.unpack(*flat, [288], 4, 32, torch.int32),
    "scale_unpack: codes must be": lambda: ops.scale_unpack(x[1:], *flat, 4, 32),
    "scale_unpack: dy must be": lambda: ops.scale_unpack(x.int(), *flat, 4, 32),
    "gelu_pack: approximate must be one of ('none', 'tanh'), found 'erf'": lambda: ops.gelu_pack(x, "erf", 4, 32),
    "geglu_pack: approximate must be": lambda: ops.geglu_pack(x, x, "erf", 4, 32),
    "geglu_pack: g must be torch.float32 [6, 48] as a is, found torch.float32 [5, 48]": lambda: ops.geglu_pack(
        x, x[1:], "none", 4, 32
    ),
    "swiglu_pack: g must be": lambda: ops.swiglu_pack(x, x.half(), 4, 32),
    "geglu_backward: codes_q must be": lambda: ops.geglu_backward(x, *flat, flat[0][1:], flat[1], 4, 32),
    "norm_pack: rstd must have one element a row": lambda: ops.norm_pack(x, None, torch.ones(5), 4, 32),
    "norm_pack: rstd must be float32": lambda: ops.norm_pack(x, None, rstd.half(), 4, 32),
    "norm_pack: mean must have 6 elements": lambda: ops.norm_pack(x, torch.ones(3), rstd, 4, 32),
    "norm_backward: gamma must be [48], found [47]": lambda: ops.norm_backward(x, *rows, rstd, torch.ones(47), True, 1, 1, 4, 32),
    "norm_backward: S must divide a row's 48 elements, found 5": lambda: ops.norm_backward(
        x, *rows, rstd, None, True, 1, 5, 4, 32
    ),
    "norm_backward: G must divide the 6 rows, found 4": lambda: ops.norm_backward(x, *rows, rstd, None, True, 4, 1, 4, 32),
    "affine_unpack: scales must be [R, ⌈n/32⌉], found [9]": lambda: ops.affine_unpack(
        *flat, None, None, [6, 48], 6, 1, 1, 4, 32, torch.float32
    ),
    "affine_unpack: A must be [2 or 1, 48], found [3, 48]": lambda: ops.affine_unpack(
        *rows, torch.ones(3, 48), None, [6, 48], 3, 1, 1, 4, 32, torch.float32
    ),
    "affine_unpack: size must have": lambda: ops.affine_unpack(*rows, None, None, [289], 6, 1, 1, 4, 32, torch.float32),
    "silu_affine_backward: B must be float32": lambda: ops.silu_affine_backward(
        x, *rows, None, torch.ones(1, 48).half(), 6, 1, 1, 4, 32
    ),
    "silu_affine_backward: rows_per_sample must divide the 6 rows": lambda: ops.silu_affine_backward(
        x, *rows, None, None, 4, 1, 1, 4, 32
    ),
    "pack: expected all tensors on meta, found one on cpu": lambda: kernels_for("pack", x.dtype, 1, x.to("meta"), None, x),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_argument_that_does_not_fit_is_named(message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        WRONG[message]()


def test_what_kernels_do_not_take_is_left_to_torch():
    assert kernels_for("pack", torch.float64, 5, x) is None
    assert kernels_for("pack", torch.float32, 0, x) is None
    assert kernels_for("pack", torch.float32, 2**33, x) is None
