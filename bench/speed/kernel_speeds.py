"""The speed of one op with its kernel, in eager PyTorch and compiled, at the shapes of real models.

python -m speed.kernel_speeds --op gated_lora --json speeds.json    # in bench/
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from agd_fast.environment import environment
from agd_fast.files import write_json
from agd_fast.ops import OPS
from nfe_speed import commit
from speed.hardware import gpu_state, quiet
from speed.kernels import BATCHES, measure_case, measure_ceiling, real_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", choices=sorted(OPS), required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--json", type=Path, required=True, help="written after every shape")
    parser.add_argument("--lock", type=Path, help="see nfe_speed.py")
    args = parser.parse_args()
    with quiet(args.lock):
        ceiling = measure_ceiling()
    rows = []
    wanted = [(case, batch) for case in real_cases() if case.op.name == args.op for batch in args.batch]
    for left, (case, batch) in zip(reversed(range(len(wanted))), wanted, strict=True):
        rows += measure_case(case, batch, ceiling, lock=args.lock)
        found = {"environment": {**environment(), **gpu_state()}, "commit": commit(), "ceiling": asdict(ceiling)}
        write_json(args.json, {**found, "complete": not left, "rows": rows})
    print(f"{args.op}: {sum(row['note'] is not None for row in rows)} of {len(rows)} not timed", flush=True)


if __name__ == "__main__":
    main()
