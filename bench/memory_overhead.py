"""Host time of a training pass, Python and dispatch, for each way to keep less, on this machine's CPU.

python bench/memory_overhead.py                                   # SDXL, SD3 and DiT, as deep as they are and 32 channels wide
python bench/memory_overhead.py --model sdxl-1024 --rounds 15 --json out.json

Where a card is faster than the host that feeds it, at batch 1, this is a step's time. *launched*: the packing ops do
everything except run the extension's kernels. *in PyTorch*: they compute in PyTorch, as without the extension.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.reporting.tables import rich_table
from memory.overhead import MODELS, PLAIN, WAYS, Row, measure
from nfe_speed import commit

HEADER = ("", "forward CPU ms", "forward + backward CPU ms", "p20–p80", "wall ms", "beside plain", "launches")
PACKING = {"launched": False, "pytorch": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--packing", nargs="+", choices=PACKING, default=list(PACKING), help="default: both")
    parser.add_argument("--rounds", type=int, default=11, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows: list[Row] = []
    for model in args.model:
        for packing in args.packing:
            found = measure(model, args.ways, args.rounds, PACKING[packing])
            print_rows(f"{model}, packing {found[0]['packing']}", found)
            rows += found
    if args.json:
        write_json(args.json, {"environment": environment(), "commit": commit(), "rows": rows})


def print_rows(title: str, rows: Sequence[Row]) -> None:
    plain = next((row["pass_cpu_ms"]["median"] for row in rows if row["way"] == PLAIN), None)
    cells = [
        (
            row["way"],
            f"{row['forward_cpu_ms']['median']:.1f}",
            f"{(cpu := row['pass_cpu_ms'])['median']:.1f}",
            f"{cpu['p20']:.1f}–{cpu['p80']:.1f}",
            f"{row['pass_wall_ms']['median']:.1f}",
            "–" if plain is None else f"{cpu['median'] - plain:+.1f}",
            str(row["pass_launches"]),
        )
        for row in rows
    ]
    Console(width=120).print(rich_table(title, HEADER, cells))


if __name__ == "__main__":
    main()
