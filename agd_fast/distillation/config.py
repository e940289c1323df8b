"""How an adapter is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from agd_fast.checking import require_seed, require_whole

Loss = Literal["l2", "l1"]
Weighting = Literal["uniform", "omega"]
MixedPrecision = Literal["no", "fp16", "bf16"]

LEARNING_RATES = {
    "modulation": 2e-2,
    "gated_lora": 2e-2,
    "modulation+gated_lora": 4e-2,
    "cross_attention": 1e-2,
    "offset": 1e-2,
    "reference_cross_attention": 1e-4,
    "reference_offset": 1e-4,
}


def learning_rate_of(kinds: Sequence[str]) -> float:
    """The rate for the kinds together if it was tuned, else the lowest of their own."""
    tuned = [rate for joined, rate in LEARNING_RATES.items() if sorted(joined.split("+")) == sorted(kinds)]
    return tuned[0] if tuned else min(LEARNING_RATES[kind] for kind in kinds)


@dataclass(frozen=True)
class TrainConfig:
    """Training settings, for AdamW with linear warm-up and cosine decay.

    steps: number of training steps.
    batch_size: states per step, over all processes.
    micro_batch_size: largest number of states in one forward pass. The gradients of a batch are accumulated over its forward
        passes. None takes all states at once, or as many as `distill(memory="auto")` finds to fit, in equal parts where possible.
        States of different shapes always get separate forward passes.
    warmup: fraction of the steps.
    learning_rate: peak value. None takes the entry of LEARNING_RATES for the adapter's kind; these were tuned on digits teachers
        and on nothing larger (the paper trains its kinds with 1e-4 for 5,000 steps).
    max_grad_norm: norm to which the gradient is clipped.
    ema: decay of an average of the weights, which is saved instead of them; None keeps no average.
    loss: "l2" or "l1", per state.
    weighting: "omega" divides the loss of a state by (ω − 1)² + ¼, which raises the weight of small ω.
    seed: seed for the order of the states; None takes the seed of `distill`.
    checkpoint_every, log_every: number of steps between checkpoints, and between entries of the log.
    cuda_graph: run forward, loss and backward of a micro-batch as one CUDA graph. This gives the same numbers and keeps the GPU
        from waiting for the host. None and True both do so where it is possible: in one process, on CUDA, without fp16.
    """

    steps: int = 800
    batch_size: int = 128
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    ema: float | None = None
    loss: Loss = "l2"
    weighting: Weighting = "omega"
    mixed_precision: MixedPrecision = "no"
    seed: int | None = None
    checkpoint_every: int = 200
    log_every: int = 20
    cuda_graph: bool | None = None

    def __post_init__(self) -> None:
        names = ("steps", "batch_size", "micro_batch_size", "checkpoint_every", "log_every")
        require_whole(**{name: getattr(self, name) for name in names})
        require_seed(self.seed)
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, found {value}")
        for name, literal in (("loss", Loss), ("weighting", Weighting), ("mixed_precision", MixedPrecision)):
            if getattr(self, name) not in get_args(literal):
                raise ValueError(f"{name} must be one of {get_args(literal)}, found {getattr(self, name)!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps in [0, 1], found {self.warmup}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema is a decay in (0, 1) or None, found {self.ema}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
