"""Settings of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from agd_fast.ops import Kernels, checked_policy


@dataclass(frozen=True)
class EngineConfig:
    """How an optimized denoiser runs.

    compile: compile the rest of a step by torch.compile(fullgraph=True); None does so on CUDA.
    mode: the `mode` of torch.compile.
    graph: run a step as one CUDA graph; None does so on CUDA.
    repeated_blocks: compile pieces of a step that repeat, such as transformer blocks, only once, and call them with the weights
        of each. None does so if that saves more than half of the operations, and many.
    hoist: compute what does not depend on x_t before the first step.
    fold: leave out operations that change nothing, and let norms take over scales and shifts that do not depend on x_t.
    absorb: put the projections of cross-attention adapters into their keys and values where that is cheaper.
    merge: make low-rank terms beside convolutions a part of the convolutions' weights, in a copy of these, if the terms are the
        same for all samples, as in a batch of one. Needs hoist and fold.
        You can switch off hoist, fold, absorb and merge to measure what each one gives.
    join_projections: compute projections of the same tokens, such as queries, keys and values, as one matrix product with a
        stacked copy of their weights. None does so on CUDA where a single projection leaves much of the card idle.
    gelu_epilogue: let matrix products end with the gelu behind them, as cuBLAS can (on CUDA, for the tanh approximation of gelu).
        None does so where it was measured to be faster on this card.
    channels_last: convolve with channels-last copies of the weights, so that they are not converted at every step. None does so
        if a step is compiled on CUDA and the model is a UNet.
    kernels: "auto" runs pieces of the forward pass on Triton kernels where these were measured to beat PyTorch on this card,
        "always" wherever there is a kernel, "never" nowhere. None takes the value of the environment variable AGD_FAST_KERNELS,
        else "auto".
    max_table_bytes: largest size of the table that holds what depends on the step alone. If all steps of a schedule need more,
        these values are computed in each step instead.
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
