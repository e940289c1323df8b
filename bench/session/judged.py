"""Runs a check whose exit code says whether it is red, and writes the result as JSON.

python -m session.judged --json checks.json -- packing_kernels.py --check-only    # in bench/
python -m session.judged --json checks.json --sanitizer -- -m speed.kernel_checks --odd
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agd_fast.environment import environment
from agd_fast.files import write_json
from nfe_speed import commit

Row = dict[str, Any]
CUDA = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]


def judge(command: Sequence[str]) -> Row:
    """command: the arguments of Python."""
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return {"checked": list(command), "ok": done.returncode == 0, "end": done.stdout[-2000:]}


def sanitize(command: Sequence[str], tool: str) -> Row:
    """What compute-sanitizer reports of accesses outside of allocated memory. Also red if it ends without a summary."""
    own = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # otherwise tensors would be parts of larger allocations
    whole = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, *command]
    done = subprocess.run(whole, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    summary = re.findall(r"ERROR SUMMARY: .*", done.stdout)
    ok = done.returncode == 0 and bool(summary)
    return {"checked": list(command), "ok": ok, "summary": summary, "end": done.stdout[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sanitizer", action="store_true", help="through compute-sanitizer, if it is there")
    parser.add_argument("command", nargs="+", help="of Python")
    args = parser.parse_args()
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *CUDA]))
    if not args.sanitizer:
        rows = [judge(args.command)]
    elif tool:
        rows = [sanitize(args.command, tool)]
    else:
        rows = []
        print("expected compute-sanitizer on PATH, found none: nothing is checked")
    for row in rows:
        print(row["end"])
    write_json(args.json, {"environment": environment(), "commit": commit(), "complete": bool(rows), "rows": rows})
    sys.exit(any(not row["ok"] for row in rows))


if __name__ == "__main__":
    main()
