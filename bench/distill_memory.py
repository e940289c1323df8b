"""What training an adapter takes: bytes kept for backward, peak memory and time, for each way to keep less.

python bench/distill_memory.py --model sdxl-1024 --device meta --json out.json            # counted, without a GPU
python bench/distill_memory.py --model sdxl-1024 --device cuda --cap 8GiB --json out.json # real steps under a hard cap
python bench/distill_memory.py --model sdxl-1024 --device cuda --cap 6GiB --base int8 --whole --json out.json
python bench/distill_memory.py --model sdxl-1024 --device cuda --base none int8 --minutes 5 --json out.json
python bench/distill_memory.py --model sdxl-1024 --device cuda --graphed --json out.json
python bench/distill_memory.py --model sdxl-1024 --device cuda --images-per-second --budget 24GiB --json out.json

--graphed: training steps whose passes are CUDA graphs, as `distill` runs them where it can.
--whole: `agd.distill` from the first guided state to the last picture, of the pipeline with its text encoders and VAE; without
it, rows are of training steps alone. On a card each row has its own process, so that one that runs out of memory does not affect
the others. Rows that the JSON already holds are not measured again: after `--minutes`, the same call continues with the rest.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch

from agd_fast.environment import environment
from agd_fast.files import read_json, write_json
from agd_fast.memory.choose import Memory
from memory.rows import CHECKPOINTING, EAGER, MINCUT, WAYS, Row, count_row, empty_row, key, print_rows
from memory.students import ADAPTERS
from memory.training import IMAGES, train_row
from memory.whole import PIPELINES, whole_row
from nfe_speed import DTYPES, commit
from speed.architectures import ARCHITECTURES, find_architecture
from speed.hardware import gpu_state

UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9}
AT_BUDGET = ("default", ("4bit", "recompute", "blocks", CHECKPOINTING)), ("reference", (EAGER, CHECKPOINTING))  # adapter, ways


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.worker:
        row = json.loads(args.worker)
        found = whole_row(row) if row["whole"] else train_row(row, args.seconds, images=args.images, lock=args.lock)
        write_json(args.json, found)
        return
    try:
        for name in args.model:
            find_architecture(name)
    except ValueError as error:
        parser.error(str(error))
    if args.device == "meta" and args.images_per_second:
        parser.error("expected a card for --images-per-second, found --device meta")
    if args.images_per_second and not args.budget:
        parser.error("expected --budget beside --images-per-second, such as 24GiB; found none")
    if args.whole and (args.device == "meta" or args.images_per_second or not {*args.model} <= {*PIPELINES}):
        parser.error(f"--whole goes with a device and with models of {', '.join(PIPELINES)}; found {' '.join(sys.argv[1:])}")
    if args.graphed and (args.device == "meta" or args.whole):
        parser.error(f"--graphed goes with training steps on a device; found {' '.join(sys.argv[1:])}")
    rows = _measure(list(wanted(args)), args)
    print_rows(rows)


def _parser() -> argparse.ArgumentParser:
    ways = "; ".join(f"{name}: {what}" for name, what in WAYS.items())
    adapters = "; ".join(f"{name}: {what}" for name, (what, _) in ADAPTERS.items())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["sdxl-1024"], metavar="MODEL", help=", ".join(ARCHITECTURES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "meta", help="meta: count only")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--adapter", nargs="+", choices=ADAPTERS, metavar="ADAPTER", help=f"default: all. {adapters}")
    parser.add_argument(
        "--modes", nargs="+", choices=WAYS, metavar="MODE", help=f"default: all; on a card all but mincut. {ways}"
    )
    parser.add_argument(
        "--base", nargs="+", choices=("none", "int8", "nf4"), default=["none"], help="how the base's weights are held"
    )
    parser.add_argument("--optimizer", choices=("adamw", "host"), help="default: host, moments in host memory, for our modes")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the base")
    parser.add_argument("--cap", type=size_of, help="no allocation beyond it, such as 8GiB")
    parser.add_argument("--whole", action="store_true", help="a whole distillation, with few states and steps")
    parser.add_argument("--graphed", action="store_true", help="passes as CUDA graphs")
    parser.add_argument("--images-per-second", action="store_true", help="at the largest batch within --budget")
    parser.add_argument("--budget", type=size_of, help="such as 24GiB")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed steps a row")
    parser.add_argument("--images", type=int, default=IMAGES, help="a step of the optimizer; default: %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further row after that")
    parser.add_argument("--lock", type=Path, help="see on_gpu.py: others on the card stand still while times are taken")
    parser.add_argument("--json", type=Path, help="where rows are kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def size_of(text: str) -> int:
    """Bytes of "8GiB". Raises: argparse.ArgumentTypeError."""
    found = re.fullmatch(r"([\d.]+)\s*(\w+)", text)
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"expected a size such as 8GiB, in {', '.join(UNITS)}; found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def wanted(args: argparse.Namespace) -> Iterator[Row]:
    """The rows to measure, still without figures."""
    dtype = str(DTYPES[args.dtype]).removeprefix("torch.")
    for model in args.model:
        common = {"model": model, "dtype": dtype, "optimizer": args.optimizer, "device": args.device}
        common |= {"whole": args.whole, "graphed": args.graphed}
        if args.images_per_second:
            for adapter, modes in AT_BUDGET:
                if args.adapter is None or adapter in args.adapter:
                    for mode in args.modes or modes:
                        held = {"adapter": adapter, "mode": mode, "base": None, "batch": 1}
                        yield {**common, **held, "cap_bytes": args.budget, "search": True}
            continue
        ways = args.modes or [way for way in WAYS if way != MINCUT or args.device == "meta"]
        if args.whole:
            ways = [way for way in ways if way in (EAGER, *get_args(Memory))]
        for batch in args.batch:
            for adapter in args.adapter or ADAPTERS:
                for base in args.base:
                    for mode in ways:
                        held = {"adapter": adapter, "mode": mode, "base": None if base == "none" else base, "batch": batch}
                        yield {**common, **held, "cap_bytes": args.cap, "search": False}


def _measure(rows: list[Row], args: argparse.Namespace) -> list[Row]:
    """The rows of the JSON, and the missing ones as long as there is time."""
    done = read_json(args.json)["rows"] if args.json and args.json.exists() else []
    deadline = time.monotonic() + 60 * args.minutes
    for index, row in enumerate(rows, 1):
        if any(key(row) == key(found) for found in done):
            continue
        began = time.monotonic()
        made = None
        if began < deadline:
            made = count_row(row) if args.device == "meta" else _train(row, args, deadline - began)
        if made is None:
            print(f"no time left for {len(rows) - index + 1} of {len(rows)} rows; the same call goes on", file=sys.stderr)
            break
        done.append(made)
        print(f"{index}/{len(rows)} {describe(made)} ({time.monotonic() - began:.0f} s)", file=sys.stderr, flush=True)
        if args.json:
            where = {**environment(), **({"device": "meta"} if args.device == "meta" else gpu_state())}
            complete = {key(row) for row in rows} <= {key(found) for found in done}
            found = {"environment": where, "commit": commit(), "images": args.images, "complete": complete}
            write_json(args.json, {**found, "rows": done})
    return [found for row in rows for found in done if key(row) == key(found)]


def describe(row: Row) -> str:
    parts = ["whole" if row.get("whole") else "", row["model"], row["adapter"], row["mode"], row["base"] or ""]
    parts.append("graphed" if row.get("graphed") else "")
    parts.append(f"batch {row['batch']}")
    figures = {"kept": row["saved_bytes"], "peak": row["peak_bytes"]}
    shown = [f"{what} {size / 2**30:.3f} GiB" for what, size in figures.items() if size is not None]
    return ", ".join([*filter(None, parts), *shown, *filter(None, [row["note"]])])


def _train(row: Row, args: argparse.Namespace, left: float) -> Row | None:
    """Measures a row in a process of its own; None if that did not end in time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        command = [sys.executable, __file__, "--worker", json.dumps(row), "--json", str(path), "--images", str(args.images)]
        command += ["--seconds", str(args.seconds), *(["--lock", str(args.lock)] if args.lock else [])]
        try:
            code = subprocess.run(command, timeout=None if left == float("inf") else left + 60).returncode
        except subprocess.TimeoutExpired:
            return None
        return read_json(path) if path.exists() else {**empty_row(row), "note": f"its process ended with {code}"}


if __name__ == "__main__":
    main()
