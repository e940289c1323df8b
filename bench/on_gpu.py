"""All that waits for a GPU, with one command: that kernels and engine are right there, and then how fast they are.

python bench/on_gpu.py                               # each task into its own JSON; those that are there are left alone
python bench/on_gpu.py --names 'checks/*' --minutes 4
python bench/on_gpu.py --list

Checks first: every kernel with every configuration, in bfloat16, float16 and float32, against float64, off by no more than twice
what PyTorch is in that dtype; compute-sanitizer where it is installed; the tiny denoisers of tests/tiny, compiled and as one CUDA
graph a step, by the same rule. No speed is measured while a check is red. Tasks run at the same time, since most of each is
compilation; times are taken by one of them alone, while no other one is busy.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agd_fast.environment import environment
from agd_fast.files import read_json, write_json
from agd_fast.ops import OPS
from nfe_speed import commit
from speed.engine_checks import FAMILIES
from speed.hardware import quiet

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "gpu"
COUNTS = sorted(map(str, (HERE / "results").glob("nfe_speed_meta*.json")))
MODELS = [(model, batch) for model in ("sdxl-1024", "dit-xl2-256") for batch in (1, 4, 16)]
MODELS += [(model, 1) for model in ("sd21-768", "sd3-medium-1024", "pixart-sigma-1024", "wan-1.3b", "qwen-image")]
SHORT = ("--steps", "10", "--rounds", "6")  # an eager step of SDXL takes a host 0.1 s
COMPILED = ("cfg_compiled", "unguided_engine", "agd_engine")
ARMS = ("unguided", "cfg", "agd", "agd_naive", *COMPILED, "agd_kernels")
MEMORY = {  # of distilling SDXL at 1024²
    "cap8": ("--cap", "8GiB", "--modes", "exact", "8bit", "4bit", "recompute", "--adapter", "default", "cross_attention"),
    "int8_cap6": ("--cap", "6GiB", "--base", "int8", "--modes", "4bit", "recompute", "--adapter", "default", "cross_attention"),
    "uncapped": ("--modes", "eager", "checkpointing"),
    "images_at_24": ("--images-per-second", "--budget", "24GiB"),
}
THREADS = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # of each of many processes


@dataclass(frozen=True)
class Task:
    """A command that writes the JSON at its name. locks: whether it says itself when it must be alone on the card; else it always
    is."""

    name: str
    command: Sequence[str]
    locks: bool = True


def checks() -> list[Task]:
    found = [Task(f"checks/engine_{name}", ["-m", "speed.engine_checks", "--family", name]) for name in FAMILIES]
    for op in sorted(OPS):
        for dtype in ("bfloat16", "float16", "float32"):
            found.append(Task(f"checks/kernel_{op}_{dtype}", ["-m", "speed.kernel_checks", "--op", op, "--dtype", dtype]))
    return found


def speeds() -> list[Task]:
    found = [Task(f"kernels/{op}", ["-m", "speed.kernel_speeds", "--op", op]) for op in sorted(OPS)]
    for model, batch in MODELS:
        command = ["nfe_speed.py", "--model", model, "--batch", str(batch), "--dtype", "bf16", "--processes", "--counts", *COUNTS]
        found.append(Task(f"nfe_speed/{model}_{batch}", [*command, *SHORT, "--arms", *(ARMS if batch == 1 else COMPILED)]))
    found.append(Task("packing_kernels", ["packing_kernels.py"], locks=False))
    for name, options in MEMORY.items():
        found.append(Task(f"distill_memory/{name}", ["distill_memory.py", "--model", "sdxl-1024", *options], locks=False))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["*"], metavar="GLOB", help="of tasks; default: all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which what still runs is ended")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at the same time; default: the number of CPUs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="only say which tasks there are")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    stages = [[task for task in stage if any(fnmatch(task.name, name) for name in args.names)] for stage in (checks(), speeds())]
    if args.list:
        print(*(task.name for stage in stages for task in stage), sep="\n")
        return
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    run_all(stages[0], args.output, args.jobs, deadline)
    if stages[0] and "*" in args.names:
        once(args.output / "checks/sanitizer.json", sanitize)
    require_green(args.output)
    run_all(stages[1], args.output, args.jobs, deadline)


def run_all(tasks: Sequence[Task], output: Path, jobs: int, deadline: float) -> None:
    """Those whose JSON is not there yet, until the deadline."""
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(partial(run, output=output, deadline=deadline), tasks))


def run(task: Task, output: Path, deadline: float) -> None:
    """One task into its JSON, what it says beside it."""
    path = output / f"{task.name}.json"
    if path.exists() or time.monotonic() >= deadline:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = output / "lock"
    command = [sys.executable, *task.command, "--json", str(path)]
    command += ["--lock", str(lock)] if task.locks else []
    began = time.monotonic()
    with nullcontext() if task.locks else quiet(lock), path.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, cwd=HERE, env={**THREADS, **os.environ}, stdout=log, stderr=subprocess.STDOUT)
        left = deadline - time.monotonic()
        try:
            code: int | str = process.wait(None if left == float("inf") else max(left, 0))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "no time left"
    print(f"{task.name}: {'done' if code == 0 else f'failed ({code})'} after {time.monotonic() - began:.0f} s", flush=True)


def require_green(output: Path) -> None:
    """Exits where one of the checks is red."""
    for path in sorted(output.glob("checks/*.json")):
        if red := [row for row in read_json(path)["rows"] if not row["ok"]]:
            sys.exit(f"{len(red)} checks are red, first {red[0]}: see {path}; delete it to check again")


def once(path: Path, made: Any) -> None:
    if not path.exists():
        write_json(path, {"environment": environment(), "commit": commit(), **made()})


def sanitize() -> dict[str, Any]:
    """What compute-sanitizer says of every kernel at small shapes: accesses outside of what was allocated."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"tool": "not there", "rows": []}
    rows = []
    for checked in (["packing_kernels.py", "--check-only"], ["-m", "speed.kernel_checks", "--odd"]):
        command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, *checked]
        own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or tensors would be parts of larger allocations
        done = subprocess.run(command, cwd=HERE, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        summary = re.findall(r"ERROR SUMMARY: .*", done.stdout)
        print(*checked, *summary, flush=True)
        ok = done.returncode == 0 and bool(summary)
        rows.append({"checked": checked, "ok": ok, "summary": summary, "end": done.stdout[-2000:]})
    return {"tool": "memcheck", "rows": rows}


if __name__ == "__main__":
    main()
