"""The kernels in Triton's interpreter on fenced memory, a process of its own: one that reads or writes beside a tensor ends it.

python tests/fenced_kernels.py end|begin
"""

from __future__ import annotations

import faulthandler
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1] / "bench"))

import torch
from agd_fast_kernels.write_merged import write_merged_fwd

from fences import Fences
from speed.kernel_checks import check_case
from speed.kernels import odd_cases
from test_write_merged import given

if __name__ == "__main__":
    faulthandler.enable()  # says which kernel it was
    side, rows = sys.argv[1], []
    for case in odd_cases():
        for sliced in (False, True):
            with Fences(side):
                rows += check_case(case, 2, torch.float16, "cpu", sliced=sliced)
    for layout in ("contiguous", "channels last"):
        with Fences(side):
            _, *parts = given(torch.float16, layout)
            write_merged_fwd(*parts)
    red = [row for row in rows if not row["ok"]]
    print(f"{len(rows)} kernel checks, {len(red)} red {red[:1]}")
    sys.exit(bool(red))
