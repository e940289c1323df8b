"""bench/packing_kernels.py's checks of small odd shapes, of the module that build.py made; its own process, under the sanitizers.

python tests/cuda_on_host/check.py FOLDER
"""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))

from agd_fast.memory import ops
from agd_fast.memory.ops import launching
from packing_kernels import checks


def load(folder: Path) -> None:
    """Let the ops of tensors on the CPU run the module of this folder."""
    (file,) = folder.glob("_cuda.*.so")
    spec = importlib.util.spec_from_file_location("_cuda", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launching.extension_on = lambda index: module
    for name in pkgutil.iter_modules(ops.__path__):
        one = import_module(f"{ops.__name__}.{name.name}")
        if hasattr(one, "where"):
            one.where = lambda x: (0, 0)


if __name__ == "__main__":
    load(Path(sys.argv[1]))
    counts, red = Counter[str](), 0
    for row in checks("cpu", True, ops.LAUNCHERS):
        counts[row["op"]] += 1
        red += not row["ok"]
        if not row["ok"]:
            print(json.dumps(row), flush=True)
    print(f"{counts.total()} checks of {len(counts)} ops, {red} red")
    sys.exit(bool(red))
