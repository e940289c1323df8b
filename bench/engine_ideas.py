"""What each idea of the sampling engine gives, one after another: counted on models of full size, timed on the digits.

python bench/engine_ideas.py                                  # a table for docs/engine.md, and bench/results/engine_ideas.json
python bench/engine_ideas.py --kind cross_attention
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import agd_fast as agd
from agd_fast.environment import environment
from agd_fast.evaluation.evaluate import arm_sampler
from agd_fast.evaluation.speed import time_interleaved
from agd_fast.files import write_json
from nfe_speed import commit
from speed.architectures import find_architecture
from speed.arms import Workbench, randomise_zeros, shared_copy

PLAIN = agd.EngineConfig(
    compile=False, graph=False, hoist=False, fold=False, absorb=False, merge=False, kernels="never", max_table_bytes=0
)
ONCE = replace(PLAIN, hoist=True)
TABLE = replace(ONCE, max_table_bytes=2**40)
ABSORBED = replace(TABLE, absorb=True)
FOLDED = replace(ABSORBED, fold=True)
MERGED = replace(FOLDED, merge=True)
KERNELS = "Triton kernels"
IDEAS: dict[str, agd.EngineConfig | None] = {
    "adapter, not optimized": None,
    "captured as one graph": PLAIN,
    "what nothing moves, once a call": ONCE,
    "what the step moves, in a table": TABLE,
    "absorption": ABSORBED,
    "norms take rows, no operations that change nothing": FOLDED,
    "low-rank terms in the convolutions' weights": MERGED,
    "torch.compile": replace(MERGED, compile=True),
    KERNELS: replace(MERGED, kernels="always"),  # the kernels are counted, and run only on a GPU
}
MODELS = ("sdxl-1024", "sd21-768", "dit-xl2-256")
STEPS, BATCHES = 30, (1, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", help="of adapter; default: each backbone's")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "engine_ideas.json")
    args = parser.parse_args()
    rows = [*counts(args.kind), *times(args.kind, args.rounds)]
    path = args.json.with_stem(f"{args.json.stem}_{args.kind}") if args.kind else args.json
    write_json(path, {"environment": environment(), "commit": commit(), "kind": args.kind, "rows": rows})
    print(markdown(rows))


def counts(kind: str | None) -> Iterator[dict[str, Any]]:
    """FLOPs and launches per step at batch 1 in bfloat16 on the meta device; compiled code cannot be counted."""
    for model in MODELS:
        bench = Workbench(find_architecture(model), 1, STEPS, torch.device("meta"), torch.bfloat16, kind=kind, counted=True)
        arms = {"unguided": bench.arm("unguided")}
        for idea, config in IDEAS.items():
            if config is None or not config.compile:
                arms[idea] = bench.arm("agd")
                if config is not None:
                    agd.optimize(arms[idea].denoiser, config)
        for idea, arm in arms.items():
            found = bench.count(arm)
            print(model, idea, found.launches.total() / STEPS, flush=True)
            yield {
                "model": model,
                "idea": idea,
                "batch": 1,
                "flops_per_step": found.flops / STEPS,
                "launches_per_step": found.launches.total() / STEPS,
            }


def times(kind: str | None, rounds: int) -> Iterator[dict[str, Any]]:
    """Milliseconds per step of the digits DiT on the CPU, median and percentiles over interleaved sampling runs."""
    teacher = agd.datasets.digits_teacher()
    for batch in BATCHES:
        labels = torch.arange(batch) % 10
        noise = torch.randn(batch, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
        runs = {"unguided": arm_sampler(teacher, "unguided", labels, noise, 4.0, 25, batch)}
        for idea, config in IDEAS.items():
            if idea == KERNELS:
                continue
            model = replace(teacher, denoiser=shared_copy(teacher.denoiser))
            torch.manual_seed(0)
            randomise_zeros(agd.attach(model, agd.AdapterConfig(kind=kind)))
            if config is not None:
                agd.optimize(model, config)
            runs[idea] = arm_sampler(model, "agd", labels, noise, 4.0, 25, batch)
        for idea, timing in time_interleaved(runs, rounds=rounds, progress=True).items():
            yield {
                "model": teacher.name,
                "idea": idea,
                "batch": batch,
                "ms_per_step": timing.median / 25 * 1e3,
                "ms_per_step_p20": timing.p20 / 25 * 1e3,
                "ms_per_step_p80": timing.p80 / 25 * 1e3,
                "rounds": timing.rounds,
            }


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line per idea, each with all ideas before it."""
    lines = [
        "| "
        + " | ".join(
            ["", *(f"{model}: launches, FLOPs a step" for model in MODELS), *(f"digits ms, batch {b}" for b in BATCHES)]
        ),
        "| --- " * (1 + len(MODELS) + len(BATCHES)) + "|",
    ]
    lines[0] += " |"
    for idea in ("unguided", *IDEAS):
        cells = [idea if idea in ("unguided", "adapter, not optimized") else f"+ {idea}"]
        for model in MODELS:
            found = [row for row in rows if row["model"] == model and row["idea"] == idea]
            cells += [f"{row['launches_per_step']:,.0f}, {row['flops_per_step'] / 1e12:.3f} T" for row in found] or ["–"]
        for batch in BATCHES:
            found = [row for row in rows if row["idea"] == idea and row["batch"] == batch and "ms_per_step" in row]
            cells += [f"{row['ms_per_step']:.2f}" for row in found] or ["–"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
