"""Sampling speed: unguided, two-pass CFG and one-pass AGD, interleaved, on whatever device is there.

python bench/nfe_speed.py                                 # the digits teacher that ships
python bench/nfe_speed.py --batch 1 16 64 --json out.json
python bench/nfe_speed.py --teacher bench/teachers/digits-unet
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import agd_fast as agd
from agd_fast.environment import environment
from agd_fast.evaluation.evaluate import ARMS, arm_sampler, count_evaluations
from agd_fast.evaluation.speed import time_interleaved
from agd_fast.files import write_json
from agd_fast.reporting.tables import rich_table
from agd_fast.teacher import Conditions
from quality.teachers import TEACHERS, load_teacher

HEADER = ("batch", "arm", "NFE", "MFLOP / step", "ms / image", "p20", "p80", "× unguided", "CFG / this")


def measure(
    teacher: agd.Teacher, table: Conditions, batch: int, steps: int, rounds: int, guidance_scale: float
) -> list[dict[str, Any]]:
    rows = torch.arange(batch) % len(next(iter(table.values())))
    conditions = {name: value[rows].to(teacher.device) for name, value in table.items()}
    noise = torch.randn(batch, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    runs = {name: arm_sampler(teacher, name, None, noise, guidance_scale, steps, batch, conditions=conditions) for name in ARMS}
    evaluations, flops = {}, {}
    for name, run in runs.items():
        with count_evaluations(teacher.denoiser) as count, FlopCounterMode(display=False) as counter:
            run()
        evaluations[name], flops[name] = count[0] / batch, counter.get_total_flops() / steps
    timing = time_interleaved(runs, rounds=rounds, device=teacher.device, progress=True)
    return [
        {
            "model": teacher.name,
            "batch": batch,
            "steps": steps,
            "dtype": str(teacher.dtype).removeprefix("torch."),
            "arm": name,
            "nfe": evaluations[name],
            "flops_per_step": flops[name],
            "ms_per_image": time.median / batch * 1e3,
            "ms_per_image_p20": time.p20 / batch * 1e3,
            "ms_per_image_p80": time.p80 / batch * 1e3,
            "ratio_to_unguided": time.median / timing["unguided"].median,
            "speedup_over_cfg": timing["cfg"].median / time.median,
            "seconds": asdict(time),
        }
        for name, time in timing.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=TEACHERS / "digits-dit", help="folder of a finished teacher")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kind", help="of adapter, several joined by '+'; default: the backbone's")
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    bench = load_teacher(args.teacher, device=args.device)
    adapter = agd.attach(bench.teacher, agd.AdapterConfig(kind=args.kind)).config
    settings = (args.steps, args.rounds, args.guidance_scale)
    rows = [row for batch in args.batch for row in measure(bench.teacher, bench.table, batch, *settings)]
    cells = [
        (
            str(row["batch"]),
            row["arm"],
            f"{row['nfe']:g}",
            f"{row['flops_per_step'] / 1e6:.2f}",
            f"{row['ms_per_image']:.3f}",
            f"{row['ms_per_image_p20']:.3f}",
            f"{row['ms_per_image_p80']:.3f}",
            f"{row['ratio_to_unguided']:.3f}",
            f"{row['speedup_over_cfg']:.3f}",
        )
        for row in rows
    ]
    what = f"{bench.teacher.name}, {adapter.kind} adapter"
    title = f"{what}, {args.steps} steps, {args.rounds} interleaved rounds, {environment()['device']}"
    Console().print(rich_table(title, HEADER, cells))
    if args.json:
        write_json(args.json, {"environment": environment(), "commit": commit(), "adapter": adapter.to_dict(), "rows": rows})


def commit() -> str:
    """The commit that is measured, marked where the tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
