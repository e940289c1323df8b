"""What each kind of adapter explains on the digits, at the same share of parameters, with ours and with the paper's form.

python bench/digits_kinds.py --json bench/results/digits_kinds.json
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import agd_fast as agd
from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.reporting.tables import rich_table
from nfe_speed import commit

# form → what differs in the adapter and in the training
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": ({}, {}),
    "paper": ({"omega_features": "fourier", "identity_at_one": False}, {"weighting": "uniform"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["modulation", "cross_attention", "offset"])
    parser.add_argument("--train-steps", type=int, default=agd.TrainConfig.steps)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    args = parser.parse_args()
    rows = []
    for kind in args.kinds:
        for form, (adapter, train) in FORMS.items():
            with tempfile.TemporaryDirectory() as folder:
                result = agd.distill(
                    agd.datasets.digits_teacher(),
                    class_labels=range(10),
                    adapter=agd.AdapterConfig(kind=kind, **adapter),
                    train_config=agd.TrainConfig(steps=args.train_steps, seed=args.seed, **train),
                    validation=100,
                    seed=args.seed,
                    output_dir=folder,
                )
            assert result.explained is not None
            explained = result.explained.to_dict()
            rows.append({"kind": kind, "form": form, "fraction": result.fraction, "seed": args.seed, **explained})
    scales = list(rows[0]["by_scale"])
    header = ("kind", "form", "parameters", "explained", *(f"ω = {omega}" for omega in scales))
    cells = [
        (r["kind"], r["form"], f"{r['fraction']:.1%}", f"{r['mean']:.3f}", *(f"{r['by_scale'][omega]:.3f}" for omega in scales))
        for r in rows
    ]
    Console().print(rich_table("guidance explained", header, cells))
    if args.json:
        write_json(args.json, {"environment": environment(), "commit": commit(), "rows": rows})


if __name__ == "__main__":
    main()
