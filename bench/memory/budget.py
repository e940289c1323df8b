"""What a forward keeps for its backward, on paper: elements from a model's shapes, times the bytes per element in each mode.

For the default adapter: modulation, and on UNets modulation+gated_lora; of its own tensors, only per-token ones count.
Written before anything was measured; docs/memory.md holds both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODES = ("eager", "exact", "8bit", "4bit", "recompute")
B16, B8, B4 = 2.0, 1 + 2 / 64, 0.5 + 2 / 32  # bytes per element; 64 share a 16-bit scale, in 4 bits 32
RANK = 16  # of gated_lora


@dataclass(frozen=True)
class Line:
    """elements: per token and channel. bytes: per element, by mode."""

    what: str
    elements: float
    bytes: tuple[float, float, float, float, float]


GATES = Line("what a gate multiplies", 1, (B16, B16, B8, B8, B8))  # its gradient needs it
NORMS = (  # each read by a trainable scale: 8 bits also in "4bit"
    Line("norm: its input, or x̂", 1, (B16, B16, B8, B8, B8)),
    Line("norm: its output, for the trainable scale", 1, (B16, 0, 0, 0, 0)),
)
SELF = (
    Line("self-attention: q, k, v", 3, (B16, B16, B8, B8, 0)),
    Line("self-attention: output", 1, (B16, 0, 0, 0, 0)),
)


def cross(recomputed: float) -> tuple[Line, ...]:
    """With frozen keys and values. recomputed: bytes of a query in the last mode; only a norm's output can give it again."""
    return (
        Line("cross-attention: q", 1, (B16, B16, B8, B8, recomputed)),
        Line("cross-attention: output", 1, (B16, 0, 0, 0, 0)),
    )


UNET_BLOCK = (  # 3 norms, self- and cross-attention, GEGLU
    *(line for line in NORMS for _ in range(3)),
    *SELF,
    *cross(0),
    Line("GEGLU: a and g, or P and Q", 8, (B16, B16, B8, B4, 0)),
    Line("GEGLU: gelu(g)", 4, (B16, 0, 0, 0, 0)),
)
ADALN_BLOCK = (  # DiT, and SD3's two streams that attend together
    *(line for line in NORMS for _ in range(2)),
    *SELF,
    GATES,
    Line("GELU: its input, or gelu′", 4, (B16, B16, B8, B4, 0)),
    GATES,  # of the feed-forward: recomputing it would take two products of four times the width
)
PIXART_BLOCK = (*ADALN_BLOCK, *cross(B8))
GROUP_NORM = NORMS
RESNET = (  # for the channels that enter each of two norms
    *NORMS,
    Line("SiLU: its input", 1, (B16, 0, 0, 0, 0)),
    Line("convolution: its input", 1, (B16, 0, 0, 0, 0)),
)
RESAMPLER = (Line("convolution: its input", 1, (B16, 0, 0, 0, 0)),)
LOW_RANK = (Line("gated_lora: D·h, and its gated form", 2, (B16, B16, B8, B8, B8)),)  # for each channel of the rank
PROMPT = (Line("cross-attention: k, v of the prompt", 2, (B16, B16, B16, B16, 0)),)


@dataclass(frozen=True)
class Part:
    """size: tokens times channels, summed over all places of this kind."""

    lines: Sequence[Line]
    size: int


def unet(
    edge: int,
    blocks: Sequence[tuple[int, int, int]],
    shells: Sequence[tuple[int, int, int]],
    resnets: Sequence[tuple[int, int, int]],
    resampled: Sequence[tuple[int, int]],
    prompt: int,
    out: int,
) -> list[Part]:
    """blocks: (edge, channels, how many) of transformer blocks; shells: the same of the modules around them, a group norm each;
    resnets: (edge, sum of the channels of both norms, how many); resampled: (edge, channels) of resamplers' inputs."""
    return [
        Part(UNET_BLOCK, sum(edge**2 * width * count for edge, width, count in blocks)),
        Part(GROUP_NORM, sum(edge**2 * width * count for edge, width, count in shells)),
        Part(RESNET, sum(edge**2 * width * count for edge, width, count in resnets) + edge**2 * out),
        Part(RESAMPLER, sum(edge**2 * width for edge, width in resampled)),
        Part(LOW_RANK, sum(2 * RANK * edge**2 * count for edge, _, count in resnets)),
        Part(PROMPT, sum(prompt * width * count for _, width, count in blocks)),
    ]


def sdxl() -> list[Part]:
    """1024²."""
    return unet(
        128,
        blocks=[(64, 640, 10), (32, 1280, 60)],
        shells=[(64, 640, 5), (32, 1280, 6)],
        resnets=[
            *[(128, 640, 2), (128, 1280, 1), (128, 960, 2)],
            *[(64, 960, 1), (64, 1280, 1), (64, 2560, 1), (64, 1920, 1), (64, 1600, 1)],
            *[(32, 1920, 1), (32, 2560, 3), (32, 3840, 2), (32, 3200, 1)],
        ],
        resampled=[(128, 320), (64, 640), (64, 1280), (128, 640)],
        prompt=77,
        out=320,
    )


def sd21() -> list[Part]:
    """768²."""
    places = [(96, 320, 5), (48, 640, 5), (24, 1280, 5), (12, 1280, 1)]
    return unet(
        96,
        blocks=places,
        shells=places,
        resnets=[
            *[(96, 640, 2), (96, 1280, 1), (96, 960, 2)],
            *[(48, 960, 1), (48, 1280, 1), (48, 2560, 1), (48, 1920, 1), (48, 1600, 1)],
            *[(24, 1920, 1), (24, 2560, 1), (24, 3840, 2), (24, 3200, 1)],
            *[(12, 2560, 4), (12, 3840, 3)],
        ],
        resampled=[(96, 320), (48, 640), (24, 1280), (24, 1280), (48, 1280), (96, 640)],
        prompt=77,
        out=320,
    )


def adaln(lines: Sequence[Line], tokens: int, width: int, layers: int, prompt: int = 0) -> list[Part]:
    return [Part(lines, tokens * width * layers), Part(NORMS, tokens * width), Part(PROMPT, prompt * width * layers)]


MODELS = {
    "sdxl-1024": sdxl(),
    "sd21-768": sd21(),
    "sd3-medium-1024": adaln(ADALN_BLOCK, 4096 + 333, 1536, 24),
    "pixart-sigma-1024": adaln(PIXART_BLOCK, 4096, 1152, 28, prompt=300),
    "dit-xl2-256": adaln(ADALN_BLOCK, 256, 1152, 28),
}


def budget(model: str, mode: str) -> int:
    """Bytes at batch 1."""
    column = MODES.index(mode)
    return round(sum(part.size * line.elements * line.bytes[column] for part in MODELS[model] for line in part.lines))


if __name__ == "__main__":
    print(f"{'GiB':20}", *(f"{mode:>10}" for mode in MODES))
    for model in MODELS:
        print(f"{model:20}", *(f"{budget(model, mode) / 2**30:10.3f}" for mode in MODES))
