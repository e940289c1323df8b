"""The kernels, one op at a time: at shapes of real models, against PyTorch and against the card's peak."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from agd_fast.ops import OPS, Op, kernels_info
from agd_fast.ops.exactness import off
from agd_fast.ops.registry import tensors_of
from agd_fast.warning import described
from speed.hardware import quiet

Row = dict[str, Any]
Arguments = tuple[Any, ...]

BATCHES = (1, 4, 16)
CALLS = 20  # at least, in one CUDA graph: the graph's own launch is then negligible
L2 = 128 * 2**20  # more bytes than any card's L2 holds
INPUTS = 512  # most different inputs: smaller tensors are in the cache in a model as well
WARMUP, ROUNDS = 5, 50


class Random:
    """Random tensors. sliced: as slices of larger ones, so that rows begin at unaligned addresses."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str, *, seed: int = 0, sliced: bool = False) -> None:
        self.dtype, self.device, self.sliced = dtype, torch.device(device), sliced
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        sizes = (*shape[:-1], shape[-1] + 3) if self.sliced else shape
        whole = scale * torch.randn(sizes, generator=self.generator, device=self.device)
        whole = whole.to(dtype or self.dtype)
        return whole[..., 2:-1] if self.sliced else whole

    def weight(self, features: int, width: int) -> Tensor:
        """[features, width], scaled so that products are as large as what it multiplies."""
        return self(features, width, scale=width**-0.5)


def _ada_layer_norm(new: Random, B: int, T: int, C: int, rows: bool = True) -> Arguments:
    return (new(B, T, C), *((new(B, C), new(B, C)) if rows else (None, None)))


def _norm_scores(new: Random, B: int, T: int, C: int, S: int, heads: int = 1) -> Arguments:
    keys = new(B, S, C, scale=C**-0.5)
    return new(B, T, C), new(B, C), new(B, C), keys, new(B, 1, S, dtype=torch.float32), 1e-5, heads


def _gated_residual(new: Random, B: int, T: int, C: int, S: int = 0, gated: bool = True) -> Arguments:
    mix = (new(B, T, S, scale=S**-0.5), new(B, S, C)) if S else (None, None)
    return new(B, T, C), new(B, T, C), new(B, C) if gated else None, *mix


def _residual_norm(new: Random, B: int, T: int, C: int, gated: bool = True) -> Arguments:
    return new(B, T, C), new(B, T, C), new(B, C) if gated else None, new(B, C), new(B, C)


def _ada_group_norm(new: Random, B: int, C: int, H: int, W: int, groups: int = 32, channels_last: bool = False) -> Arguments:
    x = new(B, H, W, C).movedim(-1, 1) if channels_last else new(B, C, H, W)
    return x, groups, new(B, C), new(B, C), 1e-5, True


def _projection_scores(new: Random, B: int, T: int, C: int, N: int, S: int, biased: bool = False) -> Arguments:
    keys = new(B, S, C, scale=C**-0.5)
    return new(B, T, C), new.weight(N, C), new(N) if biased else None, keys, new(B, 1, S, dtype=torch.float32)


def _projection_mix(new: Random, B: int, T: int, K: int, C: int, S: int = 0, gated: bool = False) -> Arguments:
    mix = (new(B, T, S, scale=S**-0.5), new(B, S, C)) if S else (None, None)
    return new(B, T, K), new.weight(C, K), new(C), *mix, new(B, T, C), new(B, C) if gated else None


def _activated_linear(new: Random, B: int, T: int, C: int, N: int, activation: str, per_sample: bool = False) -> Arguments:
    return new(B, T, C), new.weight(N, C), new(B, N) if per_sample else new(N), activation


def _gated_lora(
    new: Random, B: int, T: int, K: int, C: int, r: int, channels_first: bool = False, channels_last: str = ""
) -> Arguments:
    """channels_last: "hidden output" or one of the two: which channels_first images are laid out so."""

    def image(name: str, width: int) -> Tensor:
        if not channels_first:
            return new(B, T, width)
        return new(B, T, width).mT if name in channels_last.split() else new(B, width, T)

    hidden, output = image("hidden", K), image("output", C)
    return hidden, output, new.weight(r, K), new.weight(C, r), new(B, r), channels_first


def _guidance_combine(new: Random, B: int, C: int, H: int, W: int) -> Arguments:
    return new(B, C, H, W), new(B, C, H, W), new(B, dtype=torch.float32)


def _guided_update(new: Random, B: int, C: int, H: int, W: int) -> Arguments:
    a, b = (new(1, dtype=torch.float32) for _ in range(2))
    return (*_guidance_combine(new, B, C, H, W), new(B, C, H, W), a, b)


ARGUMENTS: dict[str, Callable[..., Arguments]] = {
    "ada_group_norm": _ada_group_norm,
    "ada_layer_norm": _ada_layer_norm,
    "activated_linear": _activated_linear,
    "gated_lora": _gated_lora,
    "gated_residual": _gated_residual,
    "guidance_combine": _guidance_combine,
    "guided_update": _guided_update,
    "norm_scores": _norm_scores,
    "projection_mix": _projection_mix,
    "projection_scores": _projection_scores,
    "residual_norm": _residual_norm,
}


@dataclass(frozen=True)
class Case:
    """An op at a shape; gives its arguments at a batch size."""

    op: Op
    model: str
    sizes: Mapping[str, Any]

    def arguments(self, new: Random, batch: int) -> Arguments:
        return ARGUMENTS[self.op.name](new, batch, **self.sizes)

    def __str__(self) -> str:
        return f"{self.op.name} {self.model} {self.shape}"

    @property
    def shape(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes.items())


def _image(C: int, H: int) -> dict[str, int]:
    return {"C": C, "H": H, "W": H}


# Tokens T and channels C of the models' blocks; S: the tokens of ω, t and the prompt or label that a token sees.
SDXL, SD21 = (
    ({"T": 4096, "C": 640}, {"T": 1024, "C": 1280}),
    ({"T": 9216, "C": 320}, {"T": 2304, "C": 640}, {"T": 576, "C": 1280}),
)
DIT, SD3 = {"T": 256, "C": 1152}, {"T": 4096, "C": 1536}
CONVOLUTIONS = {"sdxl-1024": ((320, 128), (640, 64), (1280, 32)), "sd21-768": ((320, 96), (640, 48), (1280, 24))}
JOINED = ((2560, 32), (1920, 64), (960, 128))  # of SDXL, with skip connections concatenated
LATENTS = {"sdxl-1024": (4, 128), "sd21-768": (4, 96), "dit-xl2-256": (4, 32), "sd3-medium-1024": (16, 128)}
PROMPT, LABEL, RANK = 79, 3, 16
_UNETS = [("sdxl-1024", block) for block in SDXL] + [("sd21-768", block) for block in SD21]
_TRANSFORMERS = [("dit-xl2-256", DIT), ("sd3-medium-1024", SD3)]
_IMAGES: list[tuple[str, Mapping[str, Any]]] = [(model, _image(*latent)) for model, latent in LATENTS.items()]

SHAPES: dict[str, list[tuple[str, Mapping[str, Any]]]] = {
    "ada_group_norm": [
        *((model, _image(*one)) for model, found in CONVOLUTIONS.items() for one in found),
        *(("sdxl-1024", {**_image(*one), "channels_last": True}) for one in [*CONVOLUTIONS["sdxl-1024"], *JOINED]),
    ],
    "ada_layer_norm": [*_UNETS, *_TRANSFORMERS],
    "activated_linear": [
        *((model, {**block, "N": 8 * block["C"], "activation": "geglu"}) for model, block in _UNETS),
        *((model, {**block, "N": 4 * block["C"], "activation": "gelu_tanh"}) for model, block in _TRANSFORMERS),
    ],
    "gated_lora": [
        *((model, {"T": block["T"], "K": block["C"], "C": block["C"], "r": RANK}) for model, block in [*_UNETS, *_TRANSFORMERS]),
        *(
            (model, {"T": side * side, "K": C, "C": C, "r": RANK, "channels_first": True})
            for model, found in CONVOLUTIONS.items()
            for C, side in found
        ),
        *(
            ("sdxl-1024", {"T": side * side, "K": K, "C": C, "r": RANK, "channels_first": True, "channels_last": lasts})
            for K, C, side in [*((C, C, side) for C, side in CONVOLUTIONS["sdxl-1024"]), (2560, 1280, 32), (960, 320, 128)]
            for lasts in ("hidden output", "output")
        ),
    ],
    "gated_residual": [*_TRANSFORMERS, ("dit-xl2-256", {**DIT, "S": LABEL})],
    "guidance_combine": _IMAGES,
    "guided_update": _IMAGES,
    "norm_scores": [("dit-xl2-256", {**DIT, "S": LABEL})],
    "projection_mix": [
        *((model, {"T": block["T"], "K": block["C"], "C": block["C"], "S": PROMPT}) for model, block in _UNETS),
        ("dit-xl2-256", {"T": 256, "K": 1152, "C": 1152, "S": LABEL, "gated": True}),
        ("dit-xl2-256", {"T": 256, "K": 4608, "C": 1152, "gated": True}),
        ("sd3-medium-1024", {"T": 4096, "K": 6144, "C": 1536, "gated": True}),
    ],
    "projection_scores": [
        *((model, {**block, "N": block["C"], "S": PROMPT}) for model, block in _UNETS),
        ("dit-xl2-256", {**DIT, "N": 1152, "S": LABEL, "biased": True}),
    ],
    "residual_norm": [*((model, {**block, "gated": False}) for model, block in _UNETS), *_TRANSFORMERS],
}
# With tiles that are not full, unaligned rows, all optional arguments.
ODD: dict[str, list[Mapping[str, Any]]] = {
    "ada_group_norm": [
        {"C": 32, "H": 5, "W": 7},
        {"C": 96, "H": 33, "W": 31},
        {"C": 6, "H": 1, "W": 1, "groups": 3},
        {"C": 320, "H": 33, "W": 31, "channels_last": True},
        {"C": 111, "H": 5, "W": 7, "groups": 3, "channels_last": True},
        {"C": 66, "H": 3, "W": 1, "groups": 33, "channels_last": True},
    ],
    "ada_layer_norm": [{"T": 17, "C": 130}, {"T": 1, "C": 1}, {"T": 5, "C": 5120}, {"T": 77, "C": 1152, "rows": False}],
    "activated_linear": [
        {"T": 65, "C": 130, "N": 258, "activation": "geglu"},
        {"T": 17, "C": 33, "N": 129, "activation": "gelu", "per_sample": True},
        {"T": 1, "C": 1, "N": 1, "activation": "gelu_tanh"},
    ],
    "gated_lora": [
        {"T": 65, "K": 130, "C": 66, "r": 17},
        {"T": 1, "K": 1, "C": 1, "r": 1},
        {"T": 35, "K": 40, "C": 72, "r": 64, "channels_first": True},
        {"T": 35, "K": 130, "C": 66, "r": 17, "channels_first": True, "channels_last": "hidden output"},
        {"T": 65, "K": 40, "C": 72, "r": 16, "channels_first": True, "channels_last": "output"},
        {"T": 65, "K": 40, "C": 72, "r": 16, "channels_first": True, "channels_last": "hidden"},
    ],
    "gated_residual": [{"T": 17, "C": 130}, {"T": 33, "C": 72, "S": 16}, {"T": 1, "C": 1, "S": 1, "gated": False}],
    "guidance_combine": [{"C": 3, "H": 5, "W": 7}, {"C": 1, "H": 1, "W": 1}],
    "guided_update": [{"C": 3, "H": 5, "W": 7}, {"C": 1, "H": 1, "W": 1}],
    "norm_scores": [{"T": 17, "C": 130, "S": 3}, {"T": 33, "C": 1152, "S": 16, "heads": 4}, {"T": 1, "C": 1, "S": 1}],
    "projection_mix": [
        {"T": 65, "K": 130, "C": 66, "S": 79, "gated": True},
        {"T": 17, "K": 33, "C": 129},
        {"T": 1, "K": 1, "C": 1, "S": 1},
    ],
    "projection_scores": [
        {"T": 65, "C": 130, "N": 66, "S": 79, "biased": True},
        {"T": 17, "C": 33, "N": 129, "S": 128},
        {"T": 1, "C": 1, "N": 1, "S": 1},
    ],
    "residual_norm": [{"T": 17, "C": 130}, {"T": 1, "C": 1, "gated": False}, {"T": 5, "C": 5120}],
}


def real_cases() -> list[Case]:
    return [Case(OPS[name], model, sizes) for name in sorted(OPS) for model, sizes in SHAPES[name]]


def odd_cases() -> list[Case]:
    return [Case(OPS[name], "odd", sizes) for name in sorted(OPS) for sizes in ODD[name]]


def contenders(op: Op) -> dict[str, Callable[..., Any]]:
    """By name: "eager", "compiled", and "kernel" with each configuration, where kernels run.

    Resets the compiler: PyTorch refuses a function that it has compiled for 8 shapes.
    """
    torch.compiler.reset()
    ways = {"eager": op.reference, "compiled": torch.compile(op.reference, fullgraph=True, dynamic=False)}
    if kernels_info()["missing"]:
        return ways
    launcher = op.kernel()
    return ways | {f"kernel {json.dumps(config)}": functools.partial(launcher, config=config) for config in op.configs()}


def traffic(args: Any, outputs: Any) -> int:
    """Bytes that must be moved: every argument read once, every result written once."""
    return sum(tensor.numel() * tensor.itemsize for tensor in [*tensors_of(args), *tensors_of(outputs)])


def flops(op: Op, args: Arguments) -> int:
    """By the op's registered formula."""
    return int(flop_registry[op.overload._overloadpacket](*args, out_val=None))


@dataclass(frozen=True)
class Ceiling:
    """bandwidth: bytes/s read and written by a copy. rate: FLOP/s of a matrix product in bfloat16. Both measured on this card."""

    bandwidth: float
    rate: float

    def milliseconds(self, moved: int, flops: int) -> float:
        """The least time for moving this many bytes and computing this many FLOPs."""
        return max(moved / self.bandwidth, flops / self.rate) * 1e3


@torch.no_grad()
def measure_ceiling() -> Ceiling:
    """With a copy of 1 GiB and a product of 8192³."""
    source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
    source.random_()
    one, other = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    passes = {"copy": lambda: target.copy_(source), "product": lambda: one @ other}
    found = time_passes(passes)
    return Ceiling(2 * 2**30 / found["copy"][1] * 1e3, 2 * 8192**3 / found["product"][1] * 1e3)


class Pass:
    """Calls of a function on several arguments in turn, as one CUDA graph."""

    @torch.no_grad()
    def __init__(self, function: Callable[..., Any], inputs: Sequence[Arguments]) -> None:
        self.inputs = inputs  # kept alive: the graph reads them
        self.calls = len(inputs) * math.ceil(CALLS / len(inputs))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # this is where it compiles
            for args in inputs[:2]:
                function(*args)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for index in range(self.calls):
                function(*inputs[index % len(inputs)])

    def __call__(self) -> None:
        self.graph.replay()


def rotated(case: Case, batch: int, dtype: torch.dtype, device: str = "cuda") -> list[Arguments]:
    """Different arguments of the same shapes, enough that none is in L2 when its turn comes, at most INPUTS."""
    first = case.arguments(Random(dtype, device), batch)
    count = min(max(2, math.ceil(L2 / traffic(first, ()))), INPUTS)
    return [first, *(case.arguments(Random(dtype, device, seed=seed), batch) for seed in range(1, count))]


def time_passes(passes: Mapping[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of each by CUDA events: 20th percentile, median and 80th, interleaved, in rotated order every round."""
    names = list(passes)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-WARMUP, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            passes[name]()
            end.record()
            end.synchronize()
            if turn >= 0:
                found[name].append(start.elapsed_time(end))
    quantiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    ordered = {name: torch.tensor(ms, dtype=torch.float64).quantile(quantiles).tolist() for name, ms in found.items()}
    return {name: (low, median, high) for name, (low, median, high) in ordered.items()}


def figures(op: Op, args: Arguments, milliseconds: float, ceiling: Ceiling) -> Row:
    """What a time means. share_of_ceiling: share of the card's peak, for the bytes and products that cannot be avoided."""
    with torch.no_grad():
        moved, products = traffic(args, op.reference(*args)), flops(op, args)
    return {
        "gb_per_s": moved / milliseconds / 1e6,
        "tflop_per_s": products / milliseconds / 1e9 if products else None,
        "share_of_ceiling": ceiling.milliseconds(moved, products) / milliseconds,
    }


@torch.no_grad()
def passes_of(
    case: Case, inputs: Sequence[Arguments], wanted: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Pass], dict[str, str]]:
    """The wanted contenders that can be timed, and why the others cannot: they fail, or give wrong results."""
    args = inputs[0]
    passes: dict[str, Pass] = {}
    reasons: dict[str, str] = {}
    plain, exact = case.op.reference(*args), case.op.reference(*case.op.in_double(args))
    for name, function in contenders(case.op).items():
        if not wanted(name):
            continue
        try:
            if reason := off(function(*args), plain, exact):
                reasons[name] = reason
            else:
                passes[name] = Pass(function, inputs)
        except Exception as error:  # compilers may raise anything: the others are timed all the same
            reasons[name] = described(error)
    return passes, reasons


def measure_case(
    case: Case,
    batch: int,
    ceiling: Ceiling,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    lock: Path | None = None,
) -> list[Row]:
    """One row per contender: milliseconds of a call, or why there are none."""
    inputs = rotated(case, batch, dtype, device)
    passes, reasons = passes_of(case, inputs)
    with quiet(lock):
        times = time_passes(passes) if passes else {}
    rows = []
    for name in [*passes, *reasons]:
        arm, _, config = name.partition(" ")
        row: Row = {"op": case.op.name, "model": case.model, "shape": case.shape, "batch": batch}
        row |= {"dtype": str(dtype).removeprefix("torch."), "arm": arm, "config": json.loads(config) if config else None}
        if name in times:
            low, median, high = (ms / passes[name].calls for ms in times[name])
            row |= {"ms": median, "ms_p20": low, "ms_p80": high, **figures(case.op, inputs[0], median, ceiling)}
        rows.append(row | {"note": reasons.get(name)})
    return rows
