"""What a user may choose about the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agd_fast.ops import Kernels, checked_policy


@dataclass(frozen=True)
class EngineConfig:
    """How an optimized denoiser runs.

    compile: torch.compile(fullgraph=True) of what is left of a step; None does it on CUDA. mode: of torch.compile.
    graph: one CUDA graph a step; None does it on CUDA.
    repeated_blocks: compile pieces of a step that repeat, as transformer blocks do, once and call them with the weights of each;
        None does it where that saves more than half of the operations, and many.
    hoist: compute what does not move with x_t before the first step. fold: leave out operations that change nothing, and let
        norms take scales and shifts that do not move with x_t. absorb: put the projections of cross-attention adapters into their
        keys and values where that is cheaper. merge: make low-rank terms beside convolutions, where they are the same for all
        samples, as in a batch of one, parts of the convolutions' weights, in a copy of these; it takes the first two. The four
        can be switched off to measure what each gives.
    join_projections: compute those of the same tokens, as queries, keys and values, in one product, of a copy of their weights
        one below the other; None does it on CUDA where one alone leaves much of the card idle.
    gelu_epilogue: let products end with the gelu (its approximation by tanh, on CUDA) behind them, as cuBLAS can; None does it
        where that was measured to be faster on the card that is there.
    channels_last: convolve with copies of the weights whose channels lie side by side; None does it where a step is compiled on
        CUDA and the model is a UNet, so that they are not turned round at every step.
    kernels: "auto" puts pieces of the forward on Triton kernels where these were measured to beat PyTorch on the card that is
        there, "always" wherever there is one, "never" nowhere; None takes what the environment variable AGD_FAST_KERNELS says,
        else "auto".
    max_table_bytes: of the table that holds what depends on the step alone; where all steps of a schedule need more, it is
        computed in each step instead.
    """

    compile: bool | None = None
    mode: str | None = None
    graph: bool | None = None
    repeated_blocks: bool | None = None
    hoist: bool = True
    fold: bool = True
    absorb: bool = True
    merge: bool = True
    join_projections: bool | None = None
    gelu_epilogue: bool | None = None
    channels_last: bool | None = None
    kernels: Kernels | None = None
    max_table_bytes: int = 2**30

    def __post_init__(self) -> None:
        if self.mode in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"mode={self.mode!r} brings CUDA graphs of its own; expected None, 'default' or 'max-autotune-no-cudagraphs'"
            )
        if self.kernels is not None:
            checked_policy(self.kernels)
        if self.max_table_bytes < 0:
            raise ValueError(f"max_table_bytes must not be negative, found {self.max_table_bytes}")

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" if self.compile is None else self.compile

    def graphs(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.graph is not False
