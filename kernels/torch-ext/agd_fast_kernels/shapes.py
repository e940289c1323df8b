"""The shapes of every op's arguments, and the check of them: the same for a kernel and for its reference."""

from __future__ import annotations

import torch
from torch import Tensor

# "B|1": the size that B already has, or 1. "...": any number of sizes, the same everywhere. " or ": one of two shapes.
# C: channels. T: tokens. N: features of a projection. S: scores, those of all heads one after another. r: a rank.
SHAPES: dict[str, dict[str, str]] = {
    "ada_layer_norm": {"x": "B ... C", "gamma": "B|1 C", "beta": "B|1 C"},
    "norm_scores": {"x": "B ... C", "gamma": "B|1 C", "beta": "B|1 C", "A": "B S C", "score_bias": "B 1 S"},
    "gated_residual": {"residual": "B ... C", "y": "B ... C", "gate": "B|1 C", "P": "B ... S", "U": "B S C"},
    "residual_norm": {"residual": "B ... C", "y": "B ... C", "gate": "B|1 C", "gamma": "B|1 C", "beta": "B|1 C"},
    "ada_group_norm": {"x": "B C ...", "gamma": "B|1 C", "beta": "B|1 C"},
    "projection_scores": {"x": "B ... C", "weight": "N C", "bias": "N", "A": "B S C", "score_bias": "B 1 S"},
    "projection_mix": {
        "attended": "B ... K",
        "weight": "C K",
        "bias": "C or B C",
        "P": "B ... S",
        "U": "B S C",
        "residual": "B ... C",
        "gate": "B|1 C",
    },
    "activated_linear": {"x": "B ... C", "weight": "N C", "bias": "N or B N"},
    "gated_lora": {"hidden": "B ... K", "output": "B ... C", "down": "r K", "up": "C r", "gates": "B|1 r"},
    "gated_lora_channels_first": {"hidden": "B K ...", "output": "B C ...", "down": "r K", "up": "C r", "gates": "B|1 r"},
    "guidance_combine": {"uncond": "B ...", "cond": "B ...", "omega": "B|1"},
    "guided_update": {"uncond": "B ...", "cond": "B ...", "omega": "B|1", "sample": "B ...", "a": "B|1", "b": "B|1"},
}
# Limits of the kernels: scores of a token, over all heads; the rank of a low-rank term.
MAX_SCORES = {"norm_scores": 16, "gated_residual": 16, "projection_scores": 128, "projection_mix": 128}
MAX_RANK = 64
FLOAT32 = {"omega", "score_bias", "a", "b"}  # whatever the dtype of the others


def require(op: str, **arguments: Tensor | None) -> None:
    """Raises: ValueError naming the argument that has another shape, dtype or device than the op takes, and what was expected."""
    sizes: dict[str, tuple[int, ...]] = {}
    first: Tensor | None = None
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        first = tensor if first is None else first
        dtype = torch.float32 if name in FLOAT32 else first.dtype
        shape = SHAPES[op][name]
        if not any(_bind(one.split(), tuple(tensor.shape), sizes) for one in shape.split(" or ")):
            raise ValueError(f"{op}: {name} must be [{_text(shape, sizes)}], found {list(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be {dtype} on {first.device}, found {tensor.dtype} on {tensor.device}")
    if first is not None and not first.is_floating_point():
        raise ValueError(f"{op}: expected floating-point tensors, found {first.dtype}")


def _bind(names: list[str], shape: tuple[int, ...], sizes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the shape has these sizes; names without a size yet get theirs from it."""
    found = dict(sizes)
    rest = len(shape) - (len(names) - 1) if "..." in names else 1
    if rest < 0 or len(shape) != len(names) - ("..." in names) + (rest if "..." in names else 0):
        return False
    left = list(shape)
    for name in names:
        count = rest if name == "..." else 1
        here, left = tuple(left[:count]), left[count:]
        wanted, _, alternative = name.partition("|")
        if alternative and here == (int(alternative),):
            continue
        fixed = (int(wanted),) if wanted.isdigit() else found.setdefault(wanted, here)
        if fixed != here:
            return False
    sizes.update(found)
    return True


def _text(shape: str, sizes: dict[str, tuple[int, ...]]) -> str:
    def one(name: str) -> str:
        known = sizes.get(name.partition("|")[0])
        if known is None:
            return name
        return ", ".join(map(str, known)) + ("" if "|" not in name else f" or {name.partition('|')[2]}")

    return "] or [".join(", ".join(one(name) for name in part.split() if one(name)) for part in shape.split(" or "))
