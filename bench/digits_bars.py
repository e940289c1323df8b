"""The demo over several seeds: does an adapter clear every bar, with its interval?

python bench/digits_bars.py --seeds 5 --json bench/results/digits_bars.json
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from scipy.stats import t

from agd_fast.demo import run_demo
from agd_fast.distillation import TrainConfig
from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.reporting.tables import rich_table
from nfe_speed import commit


def bounded(values: list[float], kind: str) -> dict[str, Any]:
    """Mean, and the one-sided 95 % bound (Student's t) on the side of the bar."""
    mean, spread = statistics.mean(values), statistics.stdev(values)
    reach = float(t.ppf(0.95, len(values) - 1)) * spread / len(values) ** 0.5
    return {"mean": mean, "bound_95": mean + reach if kind == "max" else mean - reach, "values": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at least 3")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--train-steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--rounds", type=int, default=30, help="of timing; 0 for none")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            config = TrainConfig(steps=args.train_steps, seed=seed)
            output = Path(folder) / str(seed)
            runs.append(run_demo(output, seed=seed, train_config=config, samples=args.samples, timing_rounds=args.rounds))
    bars = []
    for same in zip(*(run.bars for run in runs), strict=True):
        first = same[0]
        found = bounded([bar.value for bar in same], first.kind)
        cleared = found["bound_95"] <= first.limit if first.kind == "max" else found["bound_95"] >= first.limit
        bars.append({"name": first.name, first.kind: first.limit, **found, "cleared": cleared})
    cells = [
        (
            bar["name"],
            f"{bar['mean']:.3f}",
            f"{bar['bound_95']:.3f}",
            f"≤ {bar['max']:g}" if "max" in bar else f"≥ {bar['min']:g}",
            "cleared" if bar["cleared"] else "MISSED",
        )
        for bar in bars
    ]
    Console().print(rich_table(f"{args.seeds} seeds", ("bar", "mean", "95 % bound", "limit", ""), cells))
    if args.json:
        reports = [{"seed": seed, **run.report} for seed, run in enumerate(runs)]
        write_json(args.json, {"environment": environment(), "commit": commit(), "bars": bars, "runs": reports})


if __name__ == "__main__":
    main()
