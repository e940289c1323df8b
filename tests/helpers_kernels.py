"""The rule that every kernel is held to, and the arguments that it is compiled for ahead of time."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

Case = tuple[Any, ...]


def launcher(op_name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"agd_fast_kernels.{op_name}"), f"{op_name}_fwd")


def configs(op_name: str) -> tuple[Mapping[str, int], ...]:
    return importlib.import_module(f"agd_fast_kernels.{op_name}").CONFIGS


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fill(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return fill


def interpreted(op_name: str, *args: Any, config: Mapping[str, int] | None = None) -> Any:
    """The launcher's result; what the kernel did not write of it is NaN."""
    with (
        patch("torch.empty", poisoned(torch.empty)),
        patch("torch.empty_like", poisoned(torch.empty_like)),
        patch("torch.Tensor.new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        return launcher(op_name)(*args, config=config)


def outputs(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


def assert_kernel(op_name: str, *args: Any, config: Mapping[str, int] | None = None) -> None:
    """Off the float64 reference by at most twice what the reference in its own dtype is, and a rounding, lying in memory as the
    operator says; arguments stay."""
    from agd_fast.ops import OPS  # not needed by what compiles ahead of time, and slow to import
    from agd_fast.ops.exactness import off

    op = OPS[op_name]
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    found, plain, exact = interpreted(op_name, *args, config=config), op.reference(*args), op.reference(*op.in_double(args))
    assert not off(found, plain, exact), f"{op_name}, config {config}: {off(found, plain, exact)}"
    assert all(torch.isfinite(one).all() for one in outputs(found)), f"{op_name}, config {config}"
    assert lying(found) == lying(op(*args)), f"{op_name}, config {config}"
    for name, was, arg in zip(op.signature.parameters, before, args, strict=False):
        assert not isinstance(arg, Tensor) or torch.equal(was, arg), f"{op_name}: {name} was changed"


def lying(found: Any) -> list[list[int]]:
    """The strides of all that there is more than one of."""
    each = [zip(one.shape, one.stride(), strict=True) for one in outputs(found) if one.numel()]
    return [[step for size, step in dimensions if size > 1] for dimensions in each]


def channels_last(image: Tensor) -> Tensor:
    """[B, C, ...] with its channels side by side."""
    return image.movedim(1, -1).contiguous().movedim(-1, 1)


def made(layout: str, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Random numbers of the shape, as one of several views."""
    last = len(shape) - 1
    sizes = {
        "contiguous": shape,
        "offset": (shape[0] + 1, *(size + 3 for size in shape[1:])),
        "strided": (*shape, 2),
        "transposed": shape[::-1],
        "expanded": (*shape[:-2], 1, shape[-1]) if last else shape,
    }[layout]
    numbers = (scale * torch.randn(sizes)).to(dtype)
    if layout == "offset":
        return numbers[(slice(1, None), *[slice(2, -1)] * last)]
    if layout == "strided":
        return numbers[..., 1]
    return numbers.permute(*reversed(range(len(shape)))) if layout == "transposed" else numbers.expand(shape)


def arguments(
    name: str,
    B: int = 2,
    T: int = 3,
    C: int = 8,
    K: int = 6,
    S: int = 4,
    r: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """All that an op may be given, optional ones too. C: channels of its result; K: of what it multiplies."""

    def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape).to(dtype)

    tokens, rows = (B, T, C), (B, C)
    scored = {"norm_scores": (B, S, C), "projection_scores": (B, S, K)}
    score_bias = new(B, 1, S, dtype=torch.float32)
    omega, a, b = (torch.rand(size) * 5 for size in (B, B, 1))
    return {
        "ada_layer_norm": lambda: (new(*tokens), new(*rows), new(*rows)),
        "norm_scores": lambda: (
            *(new(*tokens), new(*rows), new(*rows)),
            *(new(*scored[name]) / max(C, 1) ** 0.5, score_bias, 1e-5, 2),
        ),
        "gated_residual": lambda: (new(*tokens), new(*tokens), new(*rows), new(B, T, S), new(B, S, C)),
        "residual_norm": lambda: (new(*tokens), new(*tokens), *(new(*rows) for _ in range(3))),
        "ada_group_norm": lambda: (new(B, C, T), 2, new(*rows), new(*rows), 1e-5, True),
        "guidance_combine": lambda: (new(*tokens), new(*tokens), omega),
        "guided_update": lambda: (new(*tokens), new(*tokens), omega, new(*tokens), a, b),
        "projection_scores": lambda: (new(B, T, K), new(C, K), new(C), new(*scored[name]), score_bias),
        "projection_mix": lambda: (
            *(new(B, T, K), new(C, K), new(*rows)),
            *(new(B, T, S), new(B, S, C), new(*tokens), new(*rows)),
        ),
        "activated_linear": lambda: (new(B, T, K), new(C, K), new(*rows), "geglu"),
        "gated_lora": lambda: (new(B, T, K), new(*tokens), new(r, K), new(C, r), new(B, r)),
    }[name]()


def ada_layer_norm_cases(dtype: torch.dtype) -> list[Case]:
    x = torch.randn(2, 8, 1152, dtype=dtype)
    wide = torch.randn(2, 8, 5120, dtype=dtype)
    return [(x, None, None), (wide, wide[:, 0], wide[:, 0])]


def norm_scores_cases(dtype: torch.dtype) -> list[Case]:
    x, row, A = torch.randn(2, 8, 1152, dtype=dtype), torch.randn(2, 1152, dtype=dtype), torch.randn(2, 16, 1152, dtype=dtype)
    wide = torch.randn(2, 8, 5120, dtype=dtype)
    return [
        (x, row, row, A[:, :2], torch.randn(2, 1, 2)),
        (wide, None, None, torch.randn(2, 16, 5120, dtype=dtype), None, 1e-5, 4),
    ]


def gated_residual_cases(dtype: torch.dtype) -> list[Case]:
    x, row = torch.randn(2, 8, 1152, dtype=dtype), torch.randn(2, 1152, dtype=dtype)
    if dtype == torch.float16:
        return [(x, x, row)]
    return [(x, x, None, torch.randn(2, 8, 16, dtype=dtype), torch.randn(2, 16, 1152, dtype=dtype))]


def residual_norm_cases(dtype: torch.dtype) -> list[Case]:
    x, row, wide = torch.randn(2, 8, 1152, dtype=dtype), torch.randn(2, 1152, dtype=dtype), torch.randn(2, 8, 5120, dtype=dtype)
    return [(x, x, None, row, None), (wide, wide, wide[:, 0], wide[:, 0], wide[:, 0])]


def ada_group_norm_cases(dtype: torch.dtype) -> list[Case]:
    x, row = torch.randn(2, 64, 16, 16, dtype=dtype), torch.randn(2, 64, dtype=dtype)
    first = (x, 32, row, row, 1e-5, True)
    if dtype == torch.float16:
        return [first]
    C = {torch.bfloat16: 320, torch.float32: 2560}[dtype]
    wide, rows = channels_last(torch.randn(1, C, 32, 32, dtype=dtype)), torch.randn(1, C, dtype=dtype)
    return [first, (wide, 32, rows, rows, 1e-5, True)]


def guidance_combine_cases(dtype: torch.dtype) -> list[Case]:
    x = torch.randn(2, 4, 32, 32, dtype=dtype)
    return [(x, x, torch.ones(2))]


def guided_update_cases(dtype: torch.dtype) -> list[Case]:
    x = torch.randn(2, 4, 32, 32, dtype=dtype)
    return [(x, x, torch.ones(2), x, torch.ones(2), torch.ones(1))]


def projection_scores_cases(dtype: torch.dtype) -> list[Case]:
    x, weight, A = (torch.randn(*shape, dtype=dtype) for shape in ((2, 64, 640), (640, 640), (2, 128, 640)))
    most, least = (x, weight, weight[0], A, torch.randn(2, 1, 128)), (x, weight, None, A[:, :3])
    return {torch.bfloat16: [most], torch.float16: [least], torch.float32: [most]}[dtype]


def projection_mix_cases(dtype: torch.dtype) -> list[Case]:
    x, weight, P = (torch.randn(*shape, dtype=dtype) for shape in ((2, 64, 640), (640, 640), (2, 64, 79)))
    most, least = (x, weight, x[:, 0], P, x[:, :1].expand(2, 79, 640), x, x[:, 0]), (x, weight, weight[0], None, None, x)
    return {torch.bfloat16: [most], torch.float16: [least], torch.float32: [most]}[dtype]


def activated_linear_cases(dtype: torch.dtype) -> list[Case]:
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((2, 64, 640), (1280, 640), (2, 1280)))
    geglu, gelu, by_tanh = (x, weight, bias, "geglu"), (x, weight, bias, "gelu"), (x, weight, bias[0], "gelu_tanh")
    return {torch.bfloat16: [geglu], torch.float16: [gelu], torch.float32: [by_tanh]}[dtype]


def gated_lora_cases(dtype: torch.dtype) -> list[Case]:
    hidden, output, gates = (torch.randn(*shape, dtype=dtype) for shape in ((2, 64, 640), (2, 64, 320), (2, 64)))
    down, up = torch.randn(64, 640, dtype=dtype), torch.randn(320, 64, dtype=dtype)
    last, first = (hidden, output, down, up, gates), (hidden.mT.contiguous(), output.mT.contiguous(), down, up, gates, True)
    few = (*first[:2], down[:4], up[:, :4], None, True)
    mixed = (first[0], channels_last(first[1]), down[:16], up[:, :16], None, True)  # as a UNet has them behind PyTorch's norm
    return {torch.bfloat16: [last, mixed], torch.float16: [first], torch.float32: [few]}[dtype]


def write_merged_cases(dtype: torch.dtype) -> list[Case]:
    shapes, rank = ((320, 640), (40, 36)), 16 if dtype == torch.bfloat16 else 64
    weights = [torch.randn(C, K, 3, 3, dtype=dtype) for C, K in shapes]
    weights = [channels_last(one) for one in weights] if dtype == torch.bfloat16 else weights
    low = [(torch.randn(C, rank, dtype=dtype), torch.randn(rank, K, dtype=dtype)) for C, K in shapes]
    centres = [one[:, :, 1, 1] for one in weights]
    return [
        ([one.clone() for one in centres] if dtype == torch.float16 else centres, centres, *map(list, zip(*low, strict=True)))
    ]


# op → arguments of a dtype: a few that differ in what the kernel is specialised for
CASES: dict[str, Callable[[torch.dtype], list[Case]]] = {
    "ada_layer_norm": ada_layer_norm_cases,
    "norm_scores": norm_scores_cases,
    "gated_residual": gated_residual_cases,
    "residual_norm": residual_norm_cases,
    "ada_group_norm": ada_group_norm_cases,
    "guidance_combine": guidance_combine_cases,
    "guided_update": guided_update_cases,
    "projection_scores": projection_scores_cases,
    "projection_mix": projection_mix_cases,
    "activated_linear": activated_linear_cases,
    "gated_lora": gated_lora_cases,
    "write_merged": write_merged_cases,
}
