"""What compiling repeated blocks once saves, and what its calls cost: architectures of full depth and little width, on a CPU.

python bench/compile_time.py                                  # a table for docs/engine.md, and bench/results/compile_time.json
python bench/compile_time.py --model dit-xl2-256 --blocks repeated

Each pair of model and way has its own process and inductor caches. Seconds are of everything in the first run; in the
table they are CPU time, the C++ compiler's included, less that of a first run without compiling. A step's milliseconds are CPU
time of its one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import agd_fast as agd
from agd_fast.environment import environment
from agd_fast.files import write_json
from nfe_speed import commit
from speed.architectures import Architecture, find_architecture
from speed.arms import Workbench

NARROW: dict[str, dict[str, Any]] = {  # of each config
    "dit-xl2-256": {"num_attention_heads": 2, "attention_head_dim": 16, "sample_size": 16},
    "sd3-medium-1024": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 32,
        "sample_size": 16,
    },
    "sdxl-1024": {
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [2, 4, 8],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "sample_size": 16,
    },
}
CONDITIONS = {  # shapes
    "sd3-medium-1024": {"encoder_hidden_states": (77, 64), "pooled_projections": (32,)},
    "sdxl-1024": {
        "encoder_hidden_states": (77, 64),
        "added_cond_kwargs.text_embeds": (32,),
        "added_cond_kwargs.time_ids": (6,),
    },
}
WAYS = {
    "not compiled": agd.EngineConfig(compile=False),
    "whole": agd.EngineConfig(compile=True, repeated_blocks=False),
    "repeated": agd.EngineConfig(compile=True, repeated_blocks=True),
}
STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=NARROW, default=list(NARROW))
    parser.add_argument("--blocks", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=20, help=f"runs of {STEPS} steps that are timed")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "compile_time.json")
    parser.add_argument("--here", action="store_true", help="measure the one model and way in this process, and print a row")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.model[0], args.blocks[0], args.rounds)))
        return
    rows = []
    for row in _rows(args.model, args.blocks, args.rounds):
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
        write_json(args.json, {"environment": environment(), "commit": commit(), "rows": rows})
    print(markdown(rows))


def _rows(models: Sequence[str], ways: Sequence[str], rounds: int) -> Iterator[dict[str, Any]]:
    for model in models:
        for way in ways:
            command = [sys.executable, __file__, "--here", "--model", model, "--blocks", way, "--rounds", str(rounds)]
            with tempfile.TemporaryDirectory() as cache:
                own = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
                found = subprocess.run(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True, check=True)
            yield json.loads(found.stdout.splitlines()[-1])


def narrow(model: str) -> Architecture:
    full = find_architecture(model)
    config = {**full.config, **NARROW[model]}
    size = config["sample_size"]
    return replace(full, config=config, sample=(full.sample[0], size, size), conditions=CONDITIONS.get(model, {}))


def measure(model: str, way: str, rounds: int) -> dict[str, Any]:
    """One row: seconds of the first forward, and milliseconds a step, median and percentiles over runs."""
    torch.set_num_threads(1)
    torch.compile(lambda x: x.sin() + 1)(torch.ones(3))  # warms up what every process begins with: headers and imports
    bench = Workbench(narrow(model), 1, STEPS, torch.device("cpu"), torch.float32)
    arm = bench.arm("agd_hoisted")
    agd.optimize(arm.denoiser, WAYS[way])
    wall, cpu = time.monotonic(), _cpu_seconds()
    bench.run(arm)
    wall, cpu = time.monotonic() - wall, _cpu_seconds() - cpu
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        bench.run(arm)
        times.append((time.thread_time() - start) / STEPS * 1e3)
    p20, p50, p80 = (float(torch.tensor(times).quantile(q)) for q in (0.2, 0.5, 0.8))
    info = agd.info(arm.denoiser)["engine"]
    return {
        "model": model,
        "blocks": way,
        "seconds": wall,
        "cpu_seconds": cpu,
        "ms_per_step": p50,
        "ms_per_step_p20": p20,
        "ms_per_step_p80": p80,
        "rounds": rounds,
        "repeated_blocks": info["repeated_blocks"],
        "slower_because": info["slower_because"],
    }


def _cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children."""
    uses = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(use.ru_utime + use.ru_stime for use in uses)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one line per model and way."""
    lines = ["| | compiled | pieces, calls | CPU seconds | ms a step |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        base = [one for one in rows if one["model"] == row["model"] and one["blocks"] == "not compiled"]
        seconds = f"{row['cpu_seconds'] - base[0]['cpu_seconds']:.1f}" if base and row not in base else "–"
        pieces = "{compiled}, {calls}".format(**row["repeated_blocks"]) if row["repeated_blocks"] else "–"
        lines.append(f"| {row['model']} | {row['blocks']} | {pieces} | {seconds} | {row['ms_per_step']:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
