"""Does training give the same result with passes as CUDA graphs? A small SDXL with random weights, way by way.

python -m memory.graph_checks --json checks.json    # in bench/

Each way distils the same states four times, over different batches in micro-batches of two sizes, with a validation in between:
without graphs; with them; without, on states that are rounded differently; and without, on the first batch over and over, as a
graph that ignores new inputs would. The distance of two adapters is the largest over all tensors, as a share of what training
changed in the tensor. Graphs may move the adapter at most twice as far as rounding does, atomic additions included, which has to
be less than the errors looked for: the first batch over and over, and a tensor that was not trained, whose distance is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import agd_fast as agd
from agd_fast.distillation.log import LOG_NAME
from agd_fast.memory.blocks import checkpointing
from agd_fast.trajectories import Batch, Trajectories
from agd_fast.warning import described
from memory.rows import CHECKPOINTING, EAGER
from speed.architectures import Architecture, build, find_architecture
from speed.arms import randomise_zeros
from speed.checking import all_right

WAYS: dict[str, dict[str, Any]] = {  # arguments of `distill`
    EAGER: {},
    CHECKPOINTING: {},
    **{mode: {"memory": mode} for mode in ("exact", "8bit", "4bit", "recompute", "blocks")},
    "int8": {"memory": "recompute", "base_weights": "int8"},
}
SDXL = find_architecture("sdxl-1024")
SMALL = replace(  # large enough that activations are packed
    SDXL,
    config={
        **SDXL.config,
        "sample_size": 16,
        "attention_head_dim": [1, 2],
        "block_out_channels": [64, 128],
        "cross_attention_dim": 64,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "projection_class_embeddings_input_dim": 32 + 6 * 256,
        "transformer_layers_per_block": [1, 2],
    },
    sample=(4, 16, 16),
    conditions={"encoder_hidden_states": (16, 64), "added_cond_kwargs.text_embeds": (32,), "added_cond_kwargs.time_ids": (6,)},
)
DTYPES = (torch.float32, torch.bfloat16)  # the first shows small errors, the second is what training runs in
STEPS = 12
Row = dict[str, Any]


class Rounded(Trajectories):
    """States moved by one unit in the last place, up or down."""

    def batches(self, rows: Tensor) -> list[Batch]:
        return [replace(batch, sample=_rounded(batch.sample)) for batch in super().batches(rows)]


class First(Trajectories):
    """Always the batch that was asked for first."""

    first: Tensor | None = None

    def batches(self, rows: Tensor) -> list[Batch]:
        self.first = rows if self.first is None else self.first
        return super().batches(self.first)


@dataclass(frozen=True)
class Trained:
    """weights: the adapter's, in float64 on the CPU. losses: one per step. passes: those of DistillResult."""

    weights: Mapping[str, Tensor]
    losses: list[float]
    passes: Mapping[str, Any]


def check(way: str, architecture: Architecture = SMALL, dtype: torch.dtype = DTYPES[0], steps: int = STEPS) -> Row:
    """The row of a way: how far graphs move the adapter and the losses, and how far rounding does."""
    row = {"way": way, "dtype": str(dtype).removeprefix("torch."), "steps": steps}
    torch.backends.cudnn.allow_tf32 = False  # otherwise convolutions round float32 to 10 bits
    try:
        return row | compare(way, architecture, dtype, steps)
    except Exception as error:  # a red row, not the end of the checks
        return row | {"ok": False, "reason": described(error)}


def compare(way: str, architecture: Architecture, dtype: torch.dtype, steps: int) -> Row:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser = build(architecture, device, dtype)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        start = _begin(denoiser, folder / "init")

        def distilled(name: str, states: Any, graphs: bool = False) -> Trained:
            train = agd.TrainConfig(
                steps=steps,
                batch_size=5,
                micro_batch_size=2,
                log_every=1,
                checkpoint_every=steps,
                cuda_graph=None if graphs else False,
            )
            return _distilled(denoiser, architecture, way, folder, name, train, states)

        plain = distilled("plain", 6)
        states = folder / "plain" / "trajectories"
        graphed = distilled("graphed", Trajectories(states), graphs=True)
        rounded, first = distilled("rounded", Rounded(states)), distilled("first", First(states))
    return verdict(plain, graphed, rounded, first, start)


def verdict(plain: Trained, graphed: Trained, rounded: Trained, first: Trained, start: Mapping[str, Tensor]) -> Row:
    """start: the weights that all runs began with."""
    off, rounding, stale = (apart(one.weights, plain.weights, start) for one in (graphed, rounded, first))
    loss_off, loss_rounding = (_losses_apart(one.losses, plain.losses) for one in (graphed, rounded))
    found = {"off": off, "rounding": rounding, "first_batch": stale, "loss_off": loss_off, "loss_rounding": loss_rounding}
    reason = ""
    if not graphed.passes["cuda_graph"] or graphed.passes["plain_because"]:
        reason = f"not all passes ran as graphs: {graphed.passes['plain_because']}"
    elif not 2 * rounding < min(stale, 1):
        reason = "rounding alone moves the adapter as far as what is looked for"
    elif not (off <= 2 * rounding and loss_off <= 2 * loss_rounding + torch.finfo(torch.float32).eps):  # the dtype of losses
        reason = "graphs move the adapter or its losses further than rounding does"
    return {**found, "equal": off == loss_off == 0, "passes": dict(graphed.passes), "ok": not reason, "reason": reason}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """The largest difference over all tensors, as a share of what training changed in the tensor; NaN and infinity are kept."""
    shares = [(found[name] - value).norm() / (value - start[name]).norm() for name, value in expected.items()]
    return float(torch.stack(shares).max())


def _begin(denoiser: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Writes an adapter with no zero weights; returns its weights."""
    torch.manual_seed(0)
    adapter = agd.attach(denoiser, agd.AdapterConfig(hidden=8, guidance_range=(2.0, 4.0)))
    randomise_zeros(adapter)
    agd.save(denoiser, folder)
    agd.unload(denoiser)
    return _in_double(adapter)


def _distilled(
    denoiser: Any, architecture: Architecture, way: str, folder: Path, name: str, train: agd.TrainConfig, states: Any
) -> Trained:
    device, dtype = next(denoiser.parameters()).device, next(denoiser.parameters()).dtype
    scheduler, config = architecture.scheduler
    null = architecture.inputs(1, device, dtype, seed=0)
    with checkpointing(denoiser) if way == CHECKPOINTING else nullcontext():
        result = agd.distill(
            denoiser,
            scheduler=getattr(diffusers, scheduler)(**config),
            conditions=architecture.inputs(3, device, dtype, seed=1),
            null_condition={name: value[0] for name, value in null.items()},
            init=folder / "init",
            output_dir=folder / name,
            train_config=train,
            trajectories=states,
            sampling_steps=3,
            validation=1,
            validate_every=train.steps // 2 + 1,  # so once before the end
            progress=False,
            **WAYS[way],
        )
    agd.unload(denoiser)
    entries = map(json.loads, (folder / name / LOG_NAME).read_text().splitlines())
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    return Trained(_in_double(result.adapter), losses, result.passes or {})


def _in_double(adapter: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().double().cpu() for name, value in adapter.named_parameters()}


def _losses_apart(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    return max(abs(one - other) / abs(other) for one, other in zip(found, expected, strict=True))


def _rounded(x: Tensor) -> Tensor:
    signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    return (x.double() * (1 + signs * torch.finfo(x.dtype).eps / 2)).to(x.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"default: {' '.join(WAYS)}")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    checks = [partial(check, way, dtype=dtype) for dtype in DTYPES for way in args.ways]
    sys.exit(not all_right(checks, len(args.ways), args.json))  # at once: a card waits for their steps


if __name__ == "__main__":
    main()
